"""Reading compiled programs, and timing them on paper."""

import jax
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.parallel.chips import CHIPS, Chip
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.roofline.collectives import Fabric, group_of
from mlpmem_jax.roofline.hlo import Instruction, Program
from mlpmem_jax.roofline.schedule import COMPUTE, INTERCONNECT, MEMORY, Simulator
from mlpmem_jax.training.losses import lm_loss

VOCAB, LENGTH = 1000, 64
CONFIG = DecoderConfig(width=256, num_layers=3, num_kv_heads=2, attention="xla")
# One second of compute is 100 operations, of memory 10 bytes, of a link 1 byte.
TOY = Chip(100.0, 1000, 10.0, 1.0)


def compiled_step(config):
    """Loss and gradients of a small decoder."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, VOCAB, rngs=nnx.Rngs(0))))

    def loss(params, tokens):
        model = nnx.merge(graphdef, params)
        final, _ = model.hidden(tokens)
        weight = jax.numpy.ones(tokens.shape)
        head = model.head_VD()
        return lm_loss(final, head, tokens, weight, vocab_size=VOCAB, chunk_tokens=10**6)[0]

    tokens = jax.ShapeDtypeStruct((4, LENGTH), "int32")
    return jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()


def simulated(text, chip=None, trips=1):
    return Simulator(Program(text), chip, Fabric(single_device_mesh(), chip), trips).total()


def test_flops_of_an_unrolled_step_agree_with_xla():
    compiled = compiled_step(CONFIG.model_copy(update={"layer_loop": "unroll"}))
    total = simulated(compiled.as_text())
    assert total.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


def test_a_scanned_step_costs_what_the_unrolled_one_costs():
    unrolled, scanned = (
        simulated(compiled_step(CONFIG.model_copy(update={"layer_loop": loop})).as_text())
        for loop in ("unroll", "scan")
    )
    assert scanned.unknown_loops == 0
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.01)


def test_batched_products_of_tpus_are_counted_without_their_holes():
    """A TPU computes [8, 8] batches of [2048, 64] · [64, 4 · 2048] as a dilated convolution."""
    shape = "f32[8,8,2048,4,2048]{2,4,3,1,0:T(8,128)}"
    window = "window={size=8x8x1 stride=7x7x1 lhs_dilate=8x8x1}"
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: bf16[8,2048,8,4,64], b: bf16[8,2048,8,64,1]) -> f32[8,8,2048,4,2048] {{
  %a = bf16[8,2048,8,4,64]{{4,3,2,1,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[8,2048,8,64,1]{{4,3,2,1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %c = {shape} convolution(%a, %b), {window}, dim_labels=0b12f_0o1i2->01b2f
}}
"""
    assert simulated(text).flops == 2 * 8 * 8 * 2048 * 4 * 2048 * 64


LOOP = """HloModule m, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %r = f32[] add(%x, %y)
}

%body (p: (s32[], f32[10,10], f32[6,10,10])) -> (s32[], f32[10,10], f32[6,10,10]) {
  %p = (s32[]{:T(128)}, f32[10,10]{1,0}, /*index=2*/f32[6,10,10]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %v = f32[10,10]{1,0} get-tuple-element(%p), index=1
  %s = f32[6,10,10]{2,1,0} get-tuple-element(%p), index=2
  %g = f32[10,10]{1,0} all-reduce(%v), replica_groups={{0,1}}, to_apply=%sum
  ROOT %t = (s32[], f32[10,10], f32[6,10,10]) tuple(%next, %g, %s)
}

%condition (p: (s32[], f32[10,10], f32[6,10,10])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[10,10]{1,0}, f32[6,10,10]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[10,10], s: f32[6,10,10]) -> f32[10,10] {
  %a = f32[10,10]{1,0} parameter(0)
  %s = f32[6,10,10]{2,1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %first = s32[]{:T(128)} copy(%zero)
  %carry = (s32[], f32[10,10], f32[6,10,10]) tuple(%first, %a, %s)
  %loop = (s32[], f32[10,10], f32[6,10,10]) while(%carry), condition=%condition, body=%body
  ROOT %out = f32[10,10]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("limit", [1, 6])
def test_rounds_follow_from_condition_and_counter(limit):
    """TPU programs do not say how often a loop runs."""
    total = simulated(LOOP.replace("LIMIT", str(limit)))
    ((traffic, count),) = total.collectives.items()
    assert (traffic.kind, traffic.bytes, traffic.group_size, count) == ("all-reduce", 400, 2, limit)
    assert traffic.wire_bytes == 400  # 2 · (n − 1) / n of the array


OVERLAP = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[10,10], b: f32[5,10]) -> f32[10,10] {
  %a = f32[10,10]{1,0:S(1)} parameter(0)
  %b = f32[5,10]{1,0:S(1)} parameter(1)
  %start = (f32[5,10]{1,0:S(1)}, f32[10,10]{1,0:S(1)}) all-gather-start(%b), GROUPS
  FIRST
  %done = f32[10,10]{1,0:S(1)} all-gather-done(%start)
  ROOT %d = f32[10,10]{1,0:S(1)} dot(%a, %done), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
DOT = "%c = f32[10,10]{1,0:S(1)} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


@pytest.mark.parametrize(("first", "exposed"), [("", 200.0), (DOT, 180.0)])
def test_overlap_only_where_the_schedule_shows_it(first, exposed):
    """A product of 2000 operations takes 20 s, the gather of 400 bytes 200 s."""
    total = simulated(
        OVERLAP.replace("FIRST", first).replace("GROUPS", "replica_groups={{0,1}}"), TOY
    )
    products = 2 if first else 1
    assert total.bound_secs == pytest.approx(
        {COMPUTE: 20.0 * products, MEMORY: 0.0, INTERCONNECT: exposed}
    )
    assert total.secs == pytest.approx(220.0)
    assert total.link_secs == pytest.approx(200.0)


SCATTER = """HloModule m, is_scheduled=true

%all-reduce-scatter.1 (p: f32[10,10]) -> f32[5,10] {
  %p = f32[10,10]{1,0} parameter(0)
  %r = f32[10,10]{1,0} all-reduce(%p), replica_groups=[1,2]<=[2], to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %s = f32[5,10]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={5,10}
}

ENTRY %main (a: f32[10,10]) -> f32[5,10] {
  %a = f32[10,10]{1,0} parameter(0)
  ROOT %f = f32[5,10]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_an_all_reduce_fused_with_its_slice_is_a_reduce_scatter():
    ((traffic, _),) = simulated(SCATTER).collectives.items()
    assert (traffic.kind, traffic.bytes, traffic.wire_bytes) == ("reduce-scatter", 400, 200)


SLICED = """HloModule m, is_scheduled=true

%fused (p: f32[6,10,10], i: s32[], z: f32[6,10,10]) -> f32[6,10,10] {
  %p = f32[6,10,10]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = f32[6,10,10]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %s = f32[1,10,10]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,10,10}
  %n = f32[1,10,10]{2,1,0} negate(%s)
  ROOT %u = f32[6,10,10]{2,1,0} dynamic-update-slice(%z, %n, %i, %zero, %zero)
}

ENTRY %main (a: f32[6,10,10], i: s32[], z: f32[6,10,10]) -> f32[6,10,10] {
  %a = f32[6,10,10]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = f32[6,10,10]{2,1,0} parameter(2)
  ROOT %f = f32[6,10,10]{2,1,0} fusion(%a, %i, %z), kind=kLoop, calls=%fused
}
"""


def test_slices_of_stacked_arrays_cost_the_slice():
    assert simulated(SLICED).memory_bytes == 400 + 4 + 400


SCATTERED = """HloModule m, is_scheduled=true

%fused (p: f32[6,10,10], i: s32[2,2], u: f32[2,10]) -> f32[6,10,10] {
  %p = f32[6,10,10]{2,1,0} parameter(0)
  %i = s32[2,2]{1,0} parameter(1)
  %u = f32[2,10]{1,0} parameter(2)
  ROOT %s = f32[6,10,10]{2,1,0} scatter(%p, %i, %u), update_window_dims={1}, to_apply=%new
}

ENTRY %main (a: f32[6,10,10], i: s32[2,2], u: f32[2,10]) -> f32[6,10,10] {
  %a = f32[6,10,10]{2,1,0} parameter(0)
  %i = s32[2,2]{1,0} parameter(1)
  %u = f32[2,10]{1,0} parameter(2)
  ROOT %f = f32[6,10,10]{2,1,0} fusion(%a, %i, %u), kind=kCustom, calls=%fused
}
"""


def test_an_update_of_some_rows_costs_these_rows():
    """A cache of keys is written in place: indices and rows are read, rows are written."""
    assert simulated(SCATTERED).memory_bytes == 16 + 80 + 80


PREFETCHED = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[80,10], b: f32[10,10]) -> f32[20,10] {
  %a = f32[80,10]{1,0} parameter(0)
  %b = f32[10,10]{1,0:S(1)} parameter(1)
  %start = ((f32[80,10]{1,0}), f32[20,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), SLICE
  FIRST
  %done = f32[20,10]{1,0:S(1)} slice-done(%start)
  ROOT %d = f32[20,10]{1,0:S(1)} dot(%done, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(("first", "exposed"), [("", 80.0), (DOT.replace("%a", "%b"), 60.0)])
def test_a_slice_that_is_fetched_ahead_costs_its_own_bytes_and_overlaps(first, exposed):
    """800 bytes of 3200 are fetched in 80 s; a product of 2000 operations takes 20 s."""
    text = PREFETCHED.replace("FIRST", first).replace("SLICE", "slice={[0:20], [0:10]}")
    total = simulated(text, TOY)
    assert total.memory_bytes == 800
    products = 60.0 if first else 40.0
    assert total.bound_secs == pytest.approx(
        {COMPUTE: products, MEMORY: exposed, INTERCONNECT: 0.0}
    )


def test_figures_of_chips_are_in_the_right_order_of_magnitude():
    for name, chip in CHIPS.items():
        assert 1e13 < chip.flops < 1e16, name
        assert 5e9 < chip.memory_bytes < 1e12, name
        assert 20 < chip.flops / chip.memory_bandwidth < 700, name


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("source_target_pairs={{0,3},{3,0}}", (0, 3)),
        ("source_target_pairs={{0,0},{1,5},{2,2}}", (1, 5)),  # some keep what they have
    ],
)
def test_groups_of_devices(text, members):
    instruction = Instruction(
        "x", "all-gather", (), (), f", channel_id=1, {text}, dimensions={{0}}"
    )
    assert group_of(instruction, 8) == members
