// The calls from outside: an XLA FFI handler, and a C function for tests (tests/helpers/native_calls.py).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "decode.h"
#include "share.h"
#include "xla/ffi/api/ffi.h"

namespace gaze {

const Kernel* find_kernel(const char* name) {
  if (!std::strcmp(name, "plain")) return &kernel_plain;
#if defined(__x86_64__)
  // The plain kernel of x86-64 is the baseline's SSE2.
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &kernel_avx2;
  if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return &kernel_avx512;
#endif
  return nullptr;
}

const char* best_kernel() {
  for (const char* name : {"avx512", "avx2"})
    if (find_kernel(name)) return name;
  return "plain";
}

namespace {

namespace ffi = xla::ffi;

std::atomic<int64_t> all_bytes_read{0};

bool kind_of(const ffi::AnyBuffer& buffer, Kind* kind) {
  switch (buffer.element_type()) {
    case ffi::F32:
      *kind = Kind::f32;
      return true;
    case ffi::BF16:
      *kind = Kind::bf16;
      return true;
    case ffi::S8:
      *kind = Kind::i8;
      return true;
    default:
      return false;
  }
}

template <class T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// Shapes and dtypes were checked in Python (native/__init__.py), which also fixes the order of the arrays:
// those of gaze_decode, then either the indices, or what selects them.
ffi::Error call(ffi::ThreadPool pool, ffi::RemainingArgs given, ffi::RemainingRets results, float scale,
                bool dense) {
  std::vector<ffi::AnyBuffer> arrays, outs;
  for (size_t i = 0; i < given.size(); ++i) {
    auto array = given.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    arrays.push_back(*array);
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto array = results.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    outs.push_back(**array);
  }
  const bool route = arrays.size() == 15 && outs.size() == 4;
  if (!route && !(arrays.size() == 11 && outs.size() == 2))
    return ffi::Error::InvalidArgument("number of arrays");
  const ffi::AnyBuffer q = arrays[0], k = arrays[1], text_k = arrays[5],
                       indices = route ? outs[2] : arrays[10];

  Call call = {};
  if (!kind_of(q, &call.query_kind) || !kind_of(k, &call.visual_kind) || !kind_of(text_k, &call.text_kind))
    return ffi::Error::InvalidArgument("dtype");
  const auto cache = k.dimensions();
  call.batch = cache[1];
  call.kv_heads = cache[2];
  call.regions = cache[3];
  call.slots = cache[4];
  call.dim = cache[5];
  call.text = text_k.dimensions()[3];
  call.group = q.dimensions()[1] / call.kv_heads;
  call.capacity = indices.dimensions()[2];
  call.per_head = indices.dimensions()[1] != call.kv_heads;
  call.dense = dense;
  call.scale = scale;
  // A layer that is not there is clamped, as jax.lax.dynamic_index_in_dim does.
  call.layer = std::clamp<int64_t>(*data<int32_t>(arrays[7]), 0, cache[0] - 1);
  call.q = data<void>(q);
  call.keys = data<void>(k);
  call.values = data<void>(arrays[2]);
  call.key_scales = data<float>(arrays[3]);
  call.value_scales = data<float>(arrays[4]);
  call.text_keys = data<void>(text_k);
  call.text_values = data<void>(arrays[6]);
  call.visual_seen = data<uint8_t>(arrays[8]);
  call.text_seen = data<uint8_t>(arrays[9]);
  call.indices = data<int32_t>(indices);
  call.out = data<void>(outs[0]);
  call.lse = data<float>(outs[1]);
  if (route) {
    if (!kind_of(arrays[11], &call.descriptor_kind)) return ffi::Error::InvalidArgument("dtype");
    call.route = 1;
    call.features = data<void>(arrays[10]);
    call.descriptors = data<void>(arrays[11]);
    call.width = arrays[11].dimensions()[4];
    call.budget = data<int32_t>(arrays[12]);
    call.visible = data<uint8_t>(arrays[13]);
    call.order = data<int32_t>(arrays[14]);
    call.scores = data<float>(outs[3]);
  }

  static const Kernel* kernel = find_kernel(best_kernel());
  Decode decode(call, *kernel);
  const int64_t items = decode.items();
  const int64_t helpers = decode.large() ? std::min(pool.num_threads(), items) - 1 : 0;
  share(
      items, helpers, [&pool](auto work) { pool.Schedule(std::move(work)); },
      [&decode](int64_t i) { decode.run(i); });
  all_bytes_read.fetch_add(decode.bytes_read(), std::memory_order_relaxed);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gaze

#define GAZE_EXPORT __attribute__((visibility("default")))

extern "C" GAZE_EXPORT XLA_FFI_Error* GazeDecode(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(GazeDecode, gaze::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("scale")
                                  .Attr<bool>("dense"));

extern "C" {

// A call on `threads` threads of its own with the kernel of that name; the bytes read, or -1 if there is no
// such kernel.
GAZE_EXPORT int64_t gaze_call(const gaze::Call* call, int32_t threads, const char* name) {
  const gaze::Kernel* kernel = gaze::find_kernel(name);
  if (kernel == nullptr) return -1;
  gaze::Decode decode(*call, *kernel);
  std::vector<std::thread> helpers;
  gaze::share(
      decode.items(), threads - 1, [&helpers](auto work) { helpers.emplace_back(std::move(work)); },
      [&decode](int64_t i) { decode.run(i); });
  for (std::thread& helper : helpers) helper.join();
  return decode.bytes_read();
}

// Bytes that all calls through XLA have read in this process.
GAZE_EXPORT int64_t gaze_bytes_read() { return gaze::all_bytes_read.load(std::memory_order_relaxed); }

GAZE_EXPORT const char* gaze_kernel() { return gaze::best_kernel(); }
GAZE_EXPORT const char* gaze_sources() { return GAZE_SOURCES; }
}
