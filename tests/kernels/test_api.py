"""The ops' front commands: names, shapes and static choices, refused in one sentence each."""

import ast
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import GazeSpec, dispatch, gaze_decode, gaze_prefill
from pallas_kernels.gaze_decode import api as decode_api
from pallas_kernels.gaze_prefill import api as prefill_api
from tests.helpers import cases


def _prefill(case, implementation="reference"):
    def call(case):
        return gaze_prefill(
            *case.arrays(),
            case.queries,
            case.places,
            case.selected,
            spec=case.spec,
            implementation=implementation,
        )

    return jax.eval_shape(call, case)


def _decode(case, implementation="reference"):
    def call(case):
        return gaze_decode(
            case.q,
            (case.k, case.v),
            case.text_k,
            case.text_v,
            case.layer,
            case.indices,
            case.visual_seen,
            case.text_seen,
            spec=case.spec,
            implementation=implementation,
        )

    return jax.eval_shape(call, case)


def test_unknown_implementations_are_refused_by_name():
    """One sentence lists what there is; nothing falls back."""
    with pytest.raises(
        ValueError, match=r"gaze_prefill has no implementation 'cuda'; choose one of \('reference', "
    ):
        _prefill(cases.prefill(cases.rows()), "cuda")
    with pytest.raises(ValueError, match="gaze_decode has no implementation ''"):
        _decode(cases.decode(), "")
    for api in (prefill_api, decode_api):
        with pytest.raises(ValueError, match="has no implementation 'fast'"):
            api.supports("fast", GazeSpec(1.0))
    with pytest.raises(ValueError, match="gaze_decode has no implementation 'fast'"):
        decode_api.pack(None, None, spec=GazeSpec(1.0), implementation="fast")


def test_what_an_implementation_cannot_do_is_refused_with_its_reason():
    """``supports`` decides; no other implementation is tried."""

    class Picky:
        @staticmethod
        def supports(spec):
            return "it wants share 'group'." if spec.select_per == "head" else None

    table = {"picky": Picky, "xla": None}
    assert dispatch.pick("op", table, "picky", GazeSpec(1.0, "kv_head")) is Picky
    with pytest.raises(NotImplementedError, match="op implementation 'picky' cannot run here: it wants"):
        dispatch.pick("op", table, "picky", GazeSpec(1.0, "head"))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_supports_says_none_for_what_runs(implementation):
    """Both general implementations run every spec."""
    for select_per in ("head", "kv_head"):
        assert prefill_api.supports(implementation, GazeSpec(1.0, select_per)) is None
        assert decode_api.supports(implementation, GazeSpec(1.0, select_per)) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"select_per": "token"}, "GazeSpec.select_per='token' must be one of"),
        ({"query_block": 0}, "query_block=0 must be at"),
    ],
)
def test_spec_refuses_nonsense(options, match):
    """A share that does not exist and an empty block raise one sentence."""
    with pytest.raises(ValueError, match=match):
        GazeSpec(1.0, **options)


def test_spec_is_hashable_and_compares_by_value():
    """It is a static jit argument."""
    assert GazeSpec(0.5, "head", 4) == GazeSpec(0.5, "head", 4)
    assert (
        len(
            {GazeSpec(0.5), GazeSpec(0.5), GazeSpec(0.25), GazeSpec(0.5, "kv_head"), GazeSpec(0.5, "head", 4)}
        )
        == 4
    )


def _cut(array, axis):
    return jnp.take(array, jnp.arange(array.shape[axis] - 1), axis=axis)


PREFILL_FIELDS = ["visual_k", "visual_v", "text_k", "text_v", "selected"]


@pytest.mark.parametrize("name", PREFILL_FIELDS)
def test_prefill_names_the_array_of_a_wrong_shape(name):
    """Each array that disagrees with the others is named with both shapes."""
    case = cases.prefill(cases.rows())
    axis = {"selected": 3}.get(name, 2)
    changed = dataclasses.replace(case, **{name: _cut(getattr(case, name), axis)})
    # visual_k and text_k say what R and S are, so a cut of theirs is found at their partner.
    found = {"visual_k": "visual_v", "text_k": "text_v"}.get(name, name)
    with pytest.raises(ValueError, match=rf"gaze_prefill: {found}.* has shape \(.*expected \("):
        _prefill(changed)


@pytest.mark.parametrize("group", ["queries", "places"])
def test_prefill_checks_every_window_and_place(group):
    """No field of Windows or KeyPlaces may have another length: nothing broadcasts silently."""
    case = cases.prefill(cases.rows())
    for field in dataclasses.fields(getattr(case, group)):
        inner = getattr(case, group)
        broken = dataclasses.replace(inner, **{field.name: getattr(inner, field.name)[:1]})
        with pytest.raises(ValueError, match=rf"gaze_prefill: {group}\.{field.name} has shape"):
            _prefill(dataclasses.replace(case, **{group: broken}))


def test_share_decides_the_head_axis():
    """A selection per head is refused under select_per "kv_head", and the reverse."""
    for select_per, other in (("head", "kv_head"), ("kv_head", "head")):
        case = cases.prefill(cases.rows(), select_per=select_per)
        spec = dataclasses.replace(case.spec, select_per=other)
        with pytest.raises(ValueError, match=rf"selected \(select_per '{other}'\) has shape"):
            _prefill(dataclasses.replace(case, spec=spec))
        case = cases.decode(select_per=select_per)
        spec = dataclasses.replace(case.spec, select_per=other)
        with pytest.raises(ValueError, match=rf"indices \(select_per '{other}'\) has shape"):
            _decode(dataclasses.replace(case, spec=spec))


def test_query_heads_must_be_a_multiple_of_kv_heads():
    """3 query heads over 2 kv heads: one sentence, from both ops."""
    case = cases.prefill(cases.rows())
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 kv heads"):
        _prefill(dataclasses.replace(case, q=case.q[:, :, :3]))
    case = cases.decode()
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 kv heads"):
        _decode(dataclasses.replace(case, q=case.q[:, :3]))


@pytest.mark.parametrize(
    ("name", "axis", "found"),
    [
        ("text_v", 3, "text_v"),
        ("text_seen", 1, "text_seen"),
        ("k", 3, "visual cache k"),
        ("v", 4, "visual cache v"),
        ("k", 0, "visual cache k"),
        ("visual_seen", 1, "visual cache k"),
        ("visual_seen", 0, "visual_seen"),
        ("indices", 0, "indices"),
    ],
)
def test_decode_names_the_array_of_a_wrong_shape(name, axis, found):
    """A cache of another R, P or L than the masks and the text stream say is refused, not misread."""
    case = cases.decode()
    with pytest.raises(ValueError, match=f"gaze_decode: {found}.* has shape"):
        _decode(dataclasses.replace(case, **{name: _cut(getattr(case, name), axis)}))


def test_the_package_imports_jax_and_numpy_only():
    """``pallas_kernels`` can be vendored: no module of it imports flax or gaze_jax."""
    found = set()
    for path in pathlib.Path(pallas_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
    assert found - set(sys.stdlib_module_names) <= {"jax", "numpy", "pallas_kernels"}


def _cache(regions=4, slots=5):
    case = cases.decode(regions=regions, slots=slots)
    options = {"spec": case.spec, "implementation": "xla"}
    return decode_api.pack(case.k, case.v, **options), case, options


@pytest.mark.parametrize("start", [-1, 3, jnp.int32(3), jnp.int32(-1)])
def test_append_refuses_a_known_start_that_does_not_fit(start):
    """2 regions at 3 of 4 would move to 2 and overwrite a region: refused wherever the number is known."""
    packed, case, options = _cache()
    piece = case.k[:, :, :, :2]
    with pytest.raises(ValueError, match=rf"2 regions at {int(start)} do not fit a cache of 4; reserve more"):
        decode_api.append(packed, piece, piece, start, **options)
    with pytest.raises(ValueError, match="8 regions do not fit a cache of 4; reserve"):
        piece = jnp.concatenate([case.k, case.k], axis=3)
        jax.jit(lambda start: decode_api.append(packed, piece, piece, start, **options))(jnp.int32(0))


def test_append_refuses_regions_of_another_kind():
    """More slots than the cache has, another D, fewer values than keys, another dtype: no cut, no cast."""
    packed, case, options = _cache()

    def refused(k, v, match):
        with pytest.raises(ValueError, match=match):
            decode_api.append(packed, k, v, 0, **options)

    wide = cases.decode(regions=2, slots=6)
    refused(wide.k, wide.v, "appended k has shape .* 6, 8.*, expected .* 5, 8")
    refused(case.k[..., :7], case.v[..., :7], "appended k has shape")
    refused(case.k, case.v[:, :, :, :2], "appended v has shape")
    refused(case.k[0], case.v[0], "appended k has shape")
    half = case.k.astype(jnp.bfloat16)
    refused(half, half, "a cache of float32 cannot take regions that pack as bfloat16")


def test_reserve_only_grows():
    """Fewer slots or a negative number of regions: refused with both sizes."""
    packed, _, options = _cache()
    with pytest.raises(ValueError, match="of 4 regions of 5 slots cannot shrink by reserving 1 regions of 4"):
        decode_api.reserve(packed, 1, slots=4, **options)
    with pytest.raises(ValueError, match="cannot shrink by reserving -1"):
        decode_api.reserve(packed, -1, **options)


def test_appending_nothing_changes_nothing():
    """No regions: the cache itself, also one without any."""
    for regions in (0, 4):
        packed, case, options = _cache(regions)
        piece = case.k[:, :, :, :0]
        assert decode_api.append(packed, piece, piece, regions, **options) is packed


@pytest.mark.parametrize(
    ("implementation", "visual_dtype", "names", "match"),
    [
        *(
            (
                name,
                dtype,
                ("q", "text_k", "text_v"),
                f"gaze_decode implementation '{name}' has no gradient; diff",
            )
            for name in ("tpu", "gpu")
            for dtype in (None, "int8")
        ),
        *((name, None, ("k", "v"), f"'{name}' has no gradient; diff") for name in ("tpu", "gpu")),
        ("offload", None, ("k", "v"), "'offload' has no gradient for a visual cache on the host; diff"),
        *(
            (name, "int8", ("k", "v"), r"rounded to int8 have no gradient; to .* set GazeSpec.visual_dtype")
            for name in decode_api.IMPLEMENTATIONS
        ),
    ],
)
def test_a_gradient_that_does_not_exist_is_refused(implementation, visual_dtype, names, match):
    """One sentence, where JAX would say nothing or return zeros: kernels, host memory and int8."""
    case = cases.decode()
    spec = dataclasses.replace(case.spec, visual_dtype=visual_dtype, interpret=True)
    options = {"spec": spec, "implementation": implementation}

    def loss(array, name):
        one = dataclasses.replace(case, **{name: array})
        packed = decode_api.pack(one.k, one.v, **options)
        rest = (one.text_k, one.text_v, one.layer, one.indices, one.visual_seen, one.text_seen)
        return jnp.sum(gaze_decode(one.q, packed, *rest, **options))

    for name in names:
        with pytest.raises(NotImplementedError, match=match):
            jax.eval_shape(jax.grad(lambda array, name=name: loss(array, name)), getattr(case, name))
