#include "decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "share.h"

namespace gaze {
namespace {

constexpr int64_t kChunk = 512;      // tokens: a chunk takes some tens of microseconds
constexpr int64_t kMostChunks = 64;  // of a unit, so that a million tokens need no more sums
constexpr int64_t kSmall = 1 << 16;  // bytes that one thread reads before another has woken up
constexpr float kNone = -std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float number(const void* from, Kind kind, int64_t at) {
  if (kind == Kind::f32) return static_cast<const float*>(from)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at]) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

void store(void* to, Kind kind, int64_t at, float value) {
  if (kind == Kind::f32) {
    static_cast<float*>(to)[at] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  // To the nearest, ties to even; a NaN must not round to infinity.
  bits = value != value ? 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1);
  static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(bits >> 16);
}

const char* after(const void* from, int64_t elements, Kind kind) {
  return static_cast<const char*>(from) + elements * bytes_of(kind);
}

// Collects tokens that the same query heads read, and attends to a tile of them when the next is known.
class Tiles {
 public:
  Tiles(const Kernel& kernel, const Rows& rows, const float* const* q, const Sums& sums)
      : kernel_(kernel), rows_(rows), q_(q), sums_(sums) {}

  void add(int64_t row, uint32_t heads) {
    Tile& tile = tiles_[now_];
    if (tile.count == kTile || (tile.count > 0 && heads != heads_[now_])) {
      turn();
      return add(row, heads);
    }
    heads_[now_] = heads;
    tile.rows[tile.count++] = row;
  }

  void end() {
    turn();
    turn();
  }

  int64_t tokens() const { return tokens_; }

 private:
  void turn() {
    const int other = 1 - now_;
    Tile& tile = tiles_[other];
    if (tile.count > 0) {
      const float* q[kGroup];
      int heads[kGroup], count = 0;
      for (int h = 0; h < kGroup; ++h) {
        if (heads_[other] >> h & 1) {
          q[count] = q_[h];
          heads[count++] = h;
        }
      }
      kernel_.attend(rows_, tile, tiles_[now_].count > 0 ? &tiles_[now_] : nullptr, q, heads, count, sums_);
      tokens_ += tile.count;
      tile.count = 0;
    }
    now_ = other;
  }

  const Kernel& kernel_;
  const Rows& rows_;
  const float* const* q_;
  const Sums& sums_;
  Tile tiles_[2];
  uint32_t heads_[2] = {0, 0};
  int now_ = 0;
  int64_t tokens_ = 0;
};

}  // namespace

struct Decode::Unit {
  int64_t row, kv_head, first,
      heads;      // batch row, kv head, first query head of the row, number of query heads
  int64_t place;  // of the kv head among those of all rows of the layer

  uint32_t all() const { return heads == 32 ? 0xffffffffu : (1u << heads) - 1; }
};

Decode::Decode(const Call& call, const Kernel& kernel) : call_(call), kernel_(kernel) {
  parts_ = ceil_div(call.group, kGroup);
  width_ = padded(call.dim);
  const int64_t heads = std::min(call.group, kGroup);
  lists_ = call.dense ? 0 : call.per_head ? heads : 1;
  const int64_t most = call.dense ? call.regions : std::min(call.regions, lists_ * call.capacity);
  regions_per_chunk_ =
      std::max(ceil_div(most, kMostChunks), std::max<int64_t>(1, kChunk / std::max<int64_t>(1, call.slots)));
  visual_chunks_ = call.slots == 0 ? 0 : ceil_div(most, regions_per_chunk_);
  chunks_ = visual_chunks_ + ceil_div(call.text, std::max(kChunk, ceil_div(call.text, kMostChunks)));
  // A unit without keys has a chunk too, which writes its zeros.
  chunks_ = std::max<int64_t>(chunks_, 1);
  queries_.assign(units() * heads * width_, 0.0f);
  sums_.resize(units() * chunks_ * heads * (width_ + 2));
  listed_.resize(units());
  ready_ = std::make_unique<std::atomic<int>[]>(units());
  left_ = std::make_unique<std::atomic<int>[]>(units());
  for (int64_t u = 0; u < units(); ++u) {
    ready_[u].store(0, std::memory_order_relaxed);
    left_[u].store(static_cast<int>(chunks_), std::memory_order_relaxed);
  }
}

Decode::Unit Decode::unit(int64_t number) const {
  const int64_t part = number % parts_, kv_head = number / parts_ % call_.kv_heads;
  const int64_t row = number / parts_ / call_.kv_heads, from = part * kGroup;
  const int64_t place = (call_.layer * call_.batch + row) * call_.kv_heads + kv_head;
  return {row, kv_head, kv_head * call_.group + from, std::min(kGroup, call_.group - from), place};
}

bool Decode::large() const {
  const int64_t per_token = 2 * call_.dim * bytes_of(call_.visual_kind);
  const int64_t visual = visual_chunks_ * regions_per_chunk_ * call_.slots * per_token;
  const int64_t described = call_.route ? call_.regions * call_.width * bytes_of(call_.descriptor_kind) : 0;
  return units() * (visual + described + call_.text * per_token) > kSmall;
}

void Decode::run(int64_t item) {
  if (item < units()) return begin(item);
  const int64_t number = (item - units()) / chunks_;
  // A thread took this unit's selection before anyone could take one of its chunks, so it is running.
  for (int spins = 0; !ready_[number].load(std::memory_order_acquire);) relax(&spins);
  chunk(number, (item - units()) % chunks_);
}

void Decode::begin(int64_t number) {
  const Unit at = unit(number);
  const int64_t heads = std::min(call_.group, kGroup);
  for (int64_t h = 0; h < at.heads; ++h) {
    float* q = &queries_[(number * heads + h) * width_];
    const int64_t from = (at.row * call_.kv_heads * call_.group + at.first + h) * call_.dim;
    for (int64_t d = 0; d < call_.dim; ++d)
      q[d] = gaze::number(call_.q, call_.query_kind, from + d) * call_.scale;
  }
  if (!call_.dense) route(at, number);
  ready_[number].store(1, std::memory_order_release);
}

void Decode::route(const Unit& at, int64_t number) {
  const int64_t shared = call_.per_head ? at.heads : 1, capacity = call_.capacity, regions = call_.regions;
  // Lists of a kv head are written by its first unit; the others, of more than kGroup query heads, make their
  // own.
  const bool own = !call_.per_head && number % parts_ != 0;
  const int64_t list = call_.per_head ? at.row * call_.kv_heads * call_.group + at.first
                                      : at.row * call_.kv_heads + at.kv_head;
  std::vector<int32_t> hidden_lists(own && call_.route ? capacity : 0);
  std::vector<float> hidden_scores(own && call_.route ? regions : 0);
  int32_t* indices = call_.indices + list * capacity;
  if (call_.route) {
    float* scores = call_.scores + list * regions;
    if (own) indices = hidden_lists.data(), scores = hidden_scores.data();
    // The score of a kv head is that of the sum of its queries.
    const int64_t width = padded(call_.width);
    std::vector<float> features(shared * width, 0.0f);
    const int64_t first = call_.per_head ? at.first : at.kv_head * call_.group;
    for (int64_t h = 0; h < (call_.per_head ? at.heads : call_.group); ++h) {
      const int64_t from = (at.row * call_.kv_heads * call_.group + first + h) * call_.width;
      float* into = &features[(call_.per_head ? h : 0) * width];
      for (int64_t e = 0; e < call_.width; ++e)
        into[e] += gaze::number(call_.features, call_.query_kind, from + e);
    }
    const float* q[kGroup];
    for (int64_t h = 0; h < shared; ++h) q[h] = &features[h * width];
    const void* rows = after(call_.descriptors, at.place * regions * call_.width, call_.descriptor_kind);
    int64_t every[kTile];
    float some[kGroup * kTile];
    for (int64_t from = 0; from < regions; from += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, regions - from));
      for (int i = 0; i < count; ++i) every[i] = from + i;
      kernel_.dots(rows, call_.descriptor_kind, call_.width, every, count, q, static_cast<int>(shared), some,
                   kTile);
      for (int64_t h = 0; h < shared; ++h)
        std::memcpy(scores + h * regions + from, some + h * kTile, count * sizeof(float));
    }
    bytes_.fetch_add(regions * call_.width * bytes_of(call_.descriptor_kind), std::memory_order_relaxed);
    const uint8_t* visible = call_.visible + at.row * regions;
    const int32_t* order = call_.order + at.row * regions;
    for (int64_t h = 0; h < shared; ++h)
      select_best(scores + h * regions, visible, order, regions, call_.budget[at.row], capacity,
                  indices + h * capacity);
  }
  uint32_t bits[kGroup];
  for (int64_t h = 0; h < shared; ++h) bits[h] = call_.per_head ? 1u << h : at.all();
  join_lists(indices, bits, shared, capacity, regions, &listed_[number]);
}

Sums Decode::sums(int64_t number, int64_t chunk) {
  const int64_t heads = std::min(call_.group, kGroup);
  float* base = &sums_[(number * chunks_ + chunk) * heads * (width_ + 2)];
  return {base, base + heads * width_, base + heads * (width_ + 1), width_};
}

void Decode::chunk(int64_t number, int64_t chunk) {
  const Unit at = unit(number);
  const int64_t heads = std::min(call_.group, kGroup);
  const Sums into = sums(number, chunk);
  std::fill(into.values, into.values + at.heads * width_, 0.0f);
  std::fill(into.top, into.top + at.heads, kNone);
  std::fill(into.total, into.total + at.heads, 0.0f);
  const float* q[kGroup];
  for (int64_t h = 0; h < at.heads; ++h) q[h] = &queries_[(number * heads + h) * width_];
  if (chunk < visual_chunks_) {
    visual_chunk(at, number, chunk, into, q);
  } else {
    text_chunk(at, chunk - visual_chunks_, into, q);
  }
  if (left_[number].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(at, number);
}

void Decode::visual_chunk(const Unit& at, int64_t number, int64_t chunk, const Sums& into,
                          const float* const* q) {
  const int64_t tokens = call_.regions * call_.slots;
  const bool scaled = call_.visual_kind == Kind::i8;
  const Rows rows = {after(call_.keys, at.place * tokens * call_.dim, call_.visual_kind),
                     after(call_.values, at.place * tokens * call_.dim, call_.visual_kind),
                     scaled ? call_.key_scales + at.place * tokens : nullptr,
                     scaled ? call_.value_scales + at.place * tokens : nullptr,
                     call_.dim,
                     call_.visual_kind};
  const uint8_t* seen = call_.visual_seen + at.row * tokens;
  const std::vector<Listed>& listed = listed_[number];
  const int64_t count = call_.dense ? call_.regions : static_cast<int64_t>(listed.size());
  const int64_t first = chunk * regions_per_chunk_, end = std::min(count, first + regions_per_chunk_);
  Tiles tiles(kernel_, rows, q, into);
  for (int64_t i = first; i < end; ++i) {
    const int64_t region = call_.dense ? i : listed[i].region;
    const uint32_t heads = call_.dense ? at.all() : listed[i].heads;
    for (int64_t slot = region * call_.slots; slot < (region + 1) * call_.slots; ++slot)
      if (seen[slot]) tiles.add(slot, heads);
  }
  tiles.end();
  const int64_t per_token = 2 * (call_.dim * bytes_of(call_.visual_kind) + (scaled ? 4 : 0));
  bytes_.fetch_add(tiles.tokens() * per_token, std::memory_order_relaxed);
}

void Decode::text_chunk(const Unit& at, int64_t chunk, const Sums& into, const float* const* q) {
  const Rows rows = {after(call_.text_keys, at.place * call_.text * call_.dim, call_.text_kind),
                     after(call_.text_values, at.place * call_.text * call_.dim, call_.text_kind),
                     nullptr,
                     nullptr,
                     call_.dim,
                     call_.text_kind};
  const uint8_t* seen = call_.text_seen + at.row * call_.text;
  const int64_t size = std::max(kChunk, ceil_div(call_.text, kMostChunks));
  Tiles tiles(kernel_, rows, q, into);
  for (int64_t s = chunk * size; s < std::min(call_.text, (chunk + 1) * size); ++s)
    if (seen[s]) tiles.add(s, at.all());
  tiles.end();
  bytes_.fetch_add(tiles.tokens() * 2 * call_.dim * bytes_of(call_.text_kind), std::memory_order_relaxed);
}

void Decode::finish(const Unit& at, int64_t number) {
  std::vector<float> joined(width_);
  const int64_t row = at.row * call_.kv_heads * call_.group + at.first;
  for (int64_t h = 0; h < at.heads; ++h) {
    float top = kNone, total = 0.0f;
    for (int64_t c = 0; c < chunks_; ++c) top = std::max(top, sums(number, c).top[h]);
    std::fill(joined.begin(), joined.end(), 0.0f);
    for (int64_t c = 0; c < chunks_; ++c) {
      const Sums part = sums(number, c);
      const float share = part.top[h] == top ? 1.0f : std::exp(part.top[h] - top);
      total += part.total[h] * share;
      for (int64_t d = 0; d < call_.dim; ++d) joined[d] += part.values[h * width_ + d] * share;
    }
    // See softmax.py: a sum of NaN is no sum of 0.
    const float divisor = total == 0.0f ? 1.0f : total;
    call_.lse[row + h] = total == 0.0f ? kNone : top + std::log(divisor);
    for (int64_t d = 0; d < call_.dim; ++d)
      store(call_.out, call_.query_kind, (row + h) * call_.dim + d, joined[d] / divisor);
  }
}

}  // namespace gaze
