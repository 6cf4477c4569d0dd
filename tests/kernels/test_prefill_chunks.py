"""The shared suite of ``gaze_prefill`` for attention in chunks, and which chunks are computed."""

import functools

import jax
import pytest

from pallas_kernels.gaze_prefill import chunks
from tests.helpers import cases
from tests.helpers.streams import PlacedView, Text, sample
from tests.kernels.prefill_suite import PrefillSuite
from tests.kernels.prefill_values import _call, _close, _cotangent


@functools.cache
def _in_chunks(gradients):
    """The programs of :class:`TestXlaInChunks`, whose chunks are no part of jit's key."""
    if gradients:
        return jax.jit(lambda case, cotangent: _pulled(case, cotangent))
    return jax.jit(lambda case: _pulled(case, None)[0])


def _pulled(case, cotangent):
    """Output, and gradients under a cotangent."""

    def forward(arrays):
        return _call(case.with_arrays(arrays), "xla")

    if cotangent is None:
        return forward(case.arrays()), None
    out, pull = jax.vjp(forward, case.arrays())
    return out, pull(cotangent)[0]


class TestXlaInChunks(PrefillSuite):
    """What a CPU does with long sequences, and every device with views: here chunks of 7 keys, 16 queries."""

    implementation = "xla"
    # Their paths are those of other tests, in chunks here or as a whole in TestXla.
    left = ("test_bf16[head]", "test_bf16[kv_head]", "test_bf16_where_no_block_divides[kv_head-2]")
    left += ("test_edge_12_group_sizes[1-head]", "test_edge_12_group_sizes[4-kv_head]")
    left += ("test_edge_12_group_sizes[5-head]", "test_edge_12_group_sizes[8-head]", "test_odd_head_dims")
    left += ("test_edge_03_no_region_or_one", "test_edge_03_one_selected_region", "test_edge_03_empty_axes")
    left += (
        "test_edge_13_query_blocks_with_remainders",
        "test_query_blocks_ignore_unseen_nan_and_equal_dense",
    )
    left += ("test_edge_08_causal_queries_inside_an_image", "test_edge_16_the_scale_changes_the_output")
    left += ("test_edge_10_unselected_regions_get_no_gradient", "test_edge_17_twice_is_bitwise_equal")
    left += ("test_forward[all-kv_head]", "test_forward[view-head]", "test_gradients[head]")
    left += ("test_gradients_equal_finite_differences", "test_padding_the_keys_changes_nothing")
    test_edge_15_sharded_over_kv_heads = None  # under jax.shard_map, in tests/models/test_ops.py

    @pytest.fixture(autouse=True)
    def _small_chunks(self, monkeypatch):
        monkeypatch.setattr(chunks, "CHUNK", 7)
        monkeypatch.setattr(chunks, "_LOGITS", 1)

    def forward(self, case):
        return _in_chunks(False)(case)

    def gradients(self, case):
        return _in_chunks(True)(case, _cotangent(case))

    @pytest.mark.parametrize("parts", [[Text(20)], [Text(1), PlacedView(6, 6)]], ids=["text", "image"])
    def test_a_stream_alone(self, parts):
        """No visual keys at all, or hardly any others; fewer than a chunk and many chunks."""
        case = cases.prefill([sample(parts)])
        _close(self.forward(case), self.expected(case), self.tolerance)

    def test_a_region_larger_than_a_chunk(self):
        """Regions of 9 tokens, some with fewer, in pieces of 5."""
        case = cases.prefill([sample([Text(1), PlacedView(5, 6), Text(3)], region=(3, 3))])
        assert case.places.visual_order.shape[2] == 9 > chunks.CHUNK
        out, got = self.gradients(case)
        _close(out, self.expected(case), self.tolerance)
        for mine, theirs in zip(got, self.expected_gradients(case), strict=True):
            _close(mine, theirs, self.tolerance)

    @pytest.mark.parametrize("scope", ["view", "all"])
    def test_only_chunks_that_are_seen_are_computed(self, monkeypatch, scope):
        """Frames of one chunk and one block each: the work of "view" is linear in them, in both passes."""
        monkeypatch.setattr(chunks, "CHUNK", 16)
        computed, seen = [], chunks._seen

        def noted(where, block, chunk):
            jax.debug.callback(lambda chunk: computed.append(int(chunk)), chunk)
            return seen(where, block, chunk)

        monkeypatch.setattr(chunks, "_seen", noted)
        for frames in (3, 6):
            # 16 tokens and a context token each; the text fills the last block.
            row = sample([*[PlacedView(4, 4)] * frames, Text(16 - frames)], context=1)
            case = cases.prefill([row], scope=scope)
            for gradients in (False, True):
                computed.clear()
                cotangent = _cotangent(case) if gradients else None
                # Another function each time: what is patched is no part of the tracing cache's key.
                jax.block_until_ready(jax.jit(lambda *a: _pulled(*a))(case, cotangent))
                jax.effects_barrier()
                # A frame sees itself, or every earlier one too, and the text sees all.
                visual = frames if scope == "view" else frames * (frames + 1) // 2
                # The text stream is one chunk, which nothing sees of the first frame.
                assert len(computed) == (visual + frames + frames) * (2 if gradients else 1)

    def test_logits_stay_in_cache(self, monkeypatch):
        """Fewer queries at once for more heads, but never a handful."""
        monkeypatch.undo()
        assert chunks.queries_at_once(512, 14, 512) == 146
        assert chunks.queries_at_once(64, 14, 512) == 64
        assert chunks.queries_at_once(512, 32 * 64, 512) == 16
