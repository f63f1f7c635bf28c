from dataclasses import replace

from dsv3 import recipes
from dsv3.plan.buffers import buffers

V3 = recipes.v3_671b()


def test_rows_at_the_experts_are_those_of_two_passes_where_they_are_woven():
    woven = buffers(V3, dtype="bfloat16")
    # 4,096 tokens x 8 copies in BF16, in and out, of a forward and a backward pass.
    assert woven.experts == 4096 * 8 * 7168 * 2 * 2 * 2
    plain = buffers(replace(V3, parallel=replace(V3.parallel, schedule="1f1b")), dtype="bfloat16")
    assert plain.experts == woven.experts // 2


def test_a_run_on_cpus_has_no_gpu_to_feed():
    tiny = buffers(recipes.tiny(), dtype="float32")
    assert tiny.system == 0
    assert tiny.total == tiny.experts + tiny.logits
