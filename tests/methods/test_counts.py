"""What methods train and store on BERT-base, without the head, is what their papers say."""

import pytest
from support.models import bert_base_counts

FUSION, PFEIFFER = 21_252_096, 894_528
LAYER = 7_087_872  # of BERT-base
LAYER_BIASES = 12 * 8_448
GATE_SET = 9_228
WIDER = 12 * (192 - 48) * (2 * 768 + 1)
HIGHER = 3 * 294_912
PAPER = {"reduction": 16, "rank": 8}


@pytest.mark.parametrize(
    ("name", "options", "trainable", "stored"),
    [
        ("adapter", {}, 894_528, 894_528),
        ("prefix", {}, 9_857_024, 184_320),
        ("lora", {}, 294_912, 294_912),
        ("unipelt-ap", {"reduction": 16}, 10_770_008, 1_097_304),
        ("unipelt-apl", PAPER, 11_074_148, 1_401_444),
        ("unipelt-apl", {**PAPER, "lora_gates": "separate"}, 11_083_376, 1_410_672),
        (
            "unipelt-aplb",
            PAPER,
            11_074_148 + LAYER_BIASES + GATE_SET,
            1_401_444 + LAYER_BIASES + GATE_SET,
        ),
        ("ap-ungated", {"reduction": 16}, 10_770_008 - 2 * GATE_SET, 1_097_304 - 2 * GATE_SET),
        ("apl-ungated", PAPER, 11_074_148 - 3 * GATE_SET, 1_401_444 - 3 * GATE_SET),
        # For few labels: bottlenecks of 192 instead of 48, and rank 32 instead of 8.
        ("unipelt-ap", {}, 10_770_008 + WIDER, 1_097_304 + WIDER),
        ("unipelt-apl", {}, 11_074_148 + WIDER + HIGHER, 1_401_444 + WIDER + HIGHER),
        ("apl-ungated", {}, 14_614_820 - 3 * GATE_SET, 4_942_116 - 3 * GATE_SET),
        ("bitfit", {}, 102_912, 102_912),
        ("full", {}, 109_482_240, 109_482_240),
        ("head", {}, 0, 0),
        ("probe", {}, 0, 0),
        ("houlsby", {}, 2_417_664, 2_417_664),
        ("houlsby", {"reduction": 16}, 1_789_056 + 38_400, 1_789_056 + 38_400),
        ("parallel-adapter", {}, 304_320, 304_320),
        ("parallel-adapter", {"parallel_bottleneck": 384}, 7_091_712, 7_091_712),
        # The table of 16 rows, its MLP of width 512, and the adapters.
        ("mam", {}, 16 * 768 + 769 * 512 + 513 * 18_432 + 304_320, 599_232),
        ("ia3", {}, 55_296, 55_296),
        ("prompt", {}, 7_680, 7_680),
        ("prompt", {"length": 100}, 76_800, 76_800),
        # Half of the matrices of bottleneck 96, the biases, and a bit an entry.
        ("sparse-adapter", {}, 884_736 + 10_368, 884_736 + 10_368 + 1_769_472 // 32),
        ("union", {"parts": "adapter,lora", "gated": False}, 894_528 + 294_912, 1_189_440),
        ("union", {"parts": "adapter,parallel"}, 894_528 + 304_320 + 18_456, 1_217_304),
        ("adamix", {}, 2_223_360, 894_528),
        ("adamix", {"experts": 1}, 894_528, 894_528),
        ("moe-adapter", {}, 12 * (4 * 19_212 + 2 * 4 * 768), 12 * (4 * 19_212 + 4 * 768)),
        ("propetl", {}, 99_136 + 1_179_648, 136_000),
        ("compacter", {}, 57_088, 57_088),
        ("compacter-plus-plus", {}, 28_576, 28_576),
        ("dora", {}, 313_344, 313_344),
        ("vera", {}, 24_576, 24_576),
        ("vera", {"rank": 1024}, 43_008, 43_008),
        ("adalora", {}, 1_991_520, 1_991_520),
        ("loreft", {}, 18_444, 18_444),
        ("madx", {}, 2 * PFEIFFER + 296_064, 2 * PFEIFFER + 296_064),
        ("adapter-fusion", {}, FUSION + PFEIFFER, FUSION + PFEIFFER),
        ("adapter-fusion", {"adapters": "a,b"}, FUSION + PFEIFFER, FUSION + 3 * PFEIFFER),
        ("lst", {}, 2_376_492, 2_376_492),
        ("lst", {"drop": "0,4,8"}, 1_819_497, 1_819_497),
        ("side-tuning", {}, 2 * LAYER + 1, 2 * LAYER + 1),
        ("side-tuning", {"layers": 4}, 4 * LAYER + 1, 4 * LAYER + 1),
        ("coda", {}, 12 * (768 + 2 * 64 * 768 + 64 + 768), 12 * (768 + 2 * 64 * 768 + 64 + 768)),
        ("top-layers", {}, 21_854_208, 21_854_208),
        ("top-layers", {"layers": 1}, 7_678_464, 7_678_464),
        ("top-layers", {"layers": 6}, 43_117_824, 43_117_824),
        ("layernorm", {}, 38_400, 38_400),
        ("bitfit", {"places": "query-intermediate"}, 46_080, 46_080),
        ("fish-mask", {}, 545_880, 545_880),
        ("child-tuning-f", {}, 109_482_240, 109_482_240),
        (
            "child-tuning-d",
            {},
            25_516_339 + 24_427_776,
            25_516_339 + 24_427_776 + 85_054_464 // 32,
        ),
        ("diff-pruning", {}, 2 * 109_482_240 + 199, 547_411),
    ],
)
def test_counts_on_bert_base_are_the_papers(
    name: str, options: dict[str, object], trainable: int, stored: int
) -> None:
    assert bert_base_counts(name, **options) == (trainable, stored)
