// Row kernels: the one description of an elementwise op over [rows, width] with optional per-row sums and noise, and its drivers.
//
// An op states a functor:
//   static constexpr int kInputs, kRowInputs, kOutputs, kSums;   // row inputs hold one number per row
//   Noise noise;                                                 // NoNoise, or a distribution of philox.h
//   template <class V> void operator()(const V* in, const V* row, V noise, V* out, V* term) const;
// and calls run_rows(functor, shape, inputs, row inputs, outputs, sums, key). Arithmetic is float, or double if a tensor is.
// The same source is a CPU op (lanes), a CUDA op (one thread per four elements), or the CUDA op emulated on the CPU.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

#include "launch.h"
#include "philox.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The first write to a large fresh tensor takes a page fault per 4 KB, which costs as much as the writing; where the system leaves
// it to programs to ask for pages of 2 MB, ask for them.
inline void ask_for_large_pages([[maybe_unused]] const Tensor& fresh) {
#if defined(MADV_HUGEPAGE) && !defined(GK_GPU)
  constexpr uintptr_t kPage = 4096, kLarge = uintptr_t{1} << 21;
  const uintptr_t bytes = static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  if (bytes < 2 * kLarge) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(fresh.data_ptr()), begin = (data + kPage - 1) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), data + bytes - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

// A new tensor on the device of another one; torch::stable::new_empty looks its operator up by name, which takes as long again.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, std::optional<ScalarType> type = {}) {
  int32_t dtype, layout, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (type) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype,
                                                          &layout, &device_type, device_index, nullptr, &result));
  Tensor fresh(result);
  ask_for_large_pages(fresh);
  return fresh;
}

// ---- description

struct RowShape {
  int64_t rows, width;
};

enum class Storage : int { kFloat, kDouble, kBFloat16, kHalf, kByte };

// Element (row, column) is data[row * row_stride + column]. Without data it is absent: read as zeros, written nowhere.
struct Array {
  void* data = nullptr;
  int64_t row_stride = 0;
  Storage storage = Storage::kFloat;
  const int64_t* lookup = nullptr;  // row inputs only: row r stands at row lookup[r * lookup_stride], kept below lookup_rows
  int64_t lookup_stride = 0, lookup_rows = 0;
  const void* onto = nullptr;  // sums only: numbers of their type, one per row, that they are added to
};

GK_FN int64_t looked_up(const Array& a, int64_t row) {
  if (!a.lookup) return row;
  const int64_t at = a.lookup[row * a.lookup_stride];
  return at < 0 ? 0 : at < a.lookup_rows ? at : a.lookup_rows - 1;
}

inline Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
    case ScalarType::Int:
      return Storage::kFloat;  // integers carry bits only
    case ScalarType::Double:
    case ScalarType::Long:
      return Storage::kDouble;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return Storage::kByte;
    default:
      STD_TORCH_CHECK(false, "unsupported dtype");
      return Storage::kFloat;
  }
}

inline ScalarType promote(ScalarType a, ScalarType b) {  // of floating types, as torch does
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType sum_type(ScalarType a) { return a == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline int64_t element_bytes(Storage storage) {
  switch (storage) {
    case Storage::kFloat:
      return 4;
    case Storage::kDouble:
      return 8;
    case Storage::kByte:
      return 1;
    default:
      return 2;
  }
}

// A tensor seen as rows: dimension 0 counts rows, the rest is one contiguous row. Copies only where that is not so.
class Rows {
 public:
  explicit Rows(const Tensor& x) : tensor_(x) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    const int64_t dims = static_cast<int64_t>(sizes.size());
    rows_ = dims ? sizes[0] : 1;
    width_ = 1;
    bool dense = true;
    for (int64_t d = dims - 1; d > 0; d--) {
      dense = dense && (sizes[d] == 1 || strides[d] == width_);
      width_ *= sizes[d];
    }
    row_stride_ = dims && rows_ > 1 ? strides[0] : width_;
    if (!dense) {
      tensor_ = torch::stable::contiguous(x);
      row_stride_ = width_;
    }
    storage_ = storage_of(x.scalar_type());
  }
  RowShape shape() const { return {rows_, width_}; }
  Array array() const { return {tensor_.data_ptr(), row_stride_, storage_}; }
  Array columns(int64_t begin) const {  // the same rows from column `begin` on
    return {static_cast<char*>(tensor_.data_ptr()) + begin * element_bytes(storage_), row_stride_, storage_};
  }

 private:
  Tensor tensor_;
  int64_t rows_, width_, row_stride_;
  Storage storage_;
};

// One number per row: a tensor (rows,), or one number for all rows.
inline Array per_row(const Tensor& x) { return {x.data_ptr(), x.numel() > 1 ? x.stride(0) : 0, storage_of(x.scalar_type())}; }

struct Keys {  // one key for all rows, or one per row
  const int64_t* data = nullptr;
  int64_t stride = 0;
  Key value{0, 0};  // used where data is null
  GK_FN Key of(int64_t row) const {
    if (!data) return value;
    const int64_t* key = data + row * stride;
    return {static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])};
  }
};

inline Keys keys_of(const Tensor& key) {  // int64 (2,) or (rows, 2), contiguous
  const int64_t* data = static_cast<const int64_t*>(key.data_ptr());
  if (key.dim() == 2) return {data, 2, {0, 0}};
  if (key.is_cuda()) return {data, 0, {0, 0}};
  return {nullptr, 0, {static_cast<uint64_t>(data[0]), static_cast<uint64_t>(data[1])}};
}

struct NoNoise {};

template <class F>
constexpr bool has_noise = !std::is_same<decltype(F::noise), NoNoise>::value;

template <int n>
using Arrays = std::array<Array, n>;

// What a driver gets; trivially copyable, so that it can be a CUDA kernel's argument. At least one slot of each kind.
template <class F>
struct RowJob {
  F f;
  int64_t rows, width;
  Array in[F::kInputs + 1], row_in[F::kRowInputs + 1], out[F::kOutputs + 1], sum[F::kSums + 1];
  Keys keys;
};

constexpr int64_t kTile = 1024;  // the most elements of a row summed in the arithmetic type before the total continues in double

}  // namespace gk

#ifdef GK_GPU
#include "rows_cuda.h"
#else
#include "rows_cpu.h"
#endif

namespace gk {

template <class F>
void run_rows(const F& f, RowShape shape, const Arrays<F::kInputs>& in, const Arrays<F::kRowInputs>& row_in,
              const Arrays<F::kOutputs>& out, const Arrays<F::kSums>& sum, const Tensor& like, const Keys& keys = {}) {
  RowJob<F> job{f, shape.rows, shape.width, {}, {}, {}, {}, keys};
  bool is_double = false, is_float = false, one_row = F::kSums == 0 && F::kRowInputs == 0 && keys.stride == 0;
  const auto take = [&](const Array& from, Array& to) {  // whether neighbouring rows touch
    to = from;
    if (!from.data) return true;
    is_double |= from.storage == Storage::kDouble;
    is_float |= from.storage == Storage::kFloat || from.storage == Storage::kHalf || from.storage == Storage::kBFloat16;
    return from.row_stride == shape.width;
  };
  for (int i = 0; i < F::kInputs; i++) one_row &= take(in[i], job.in[i]);
  for (int i = 0; i < F::kOutputs; i++) one_row &= take(out[i], job.out[i]);
  for (int i = 0; i < F::kRowInputs; i++) take(row_in[i], job.row_in[i]);
  for (int i = 0; i < F::kSums; i++) take(sum[i], job.sum[i]);
  STD_TORCH_CHECK(!(is_double && is_float), "float64 does not mix with narrower types");
  if (one_row) {  // nothing depends on the row: one long one
    job.width *= job.rows;
    job.rows = job.width ? 1 : 0;
  }
  if (job.rows == 0 || (job.width == 0 && F::kSums == 0)) return;
  if (is_double)
    drive_rows<double>(job, like);
  else
    drive_rows<float>(job, like);
}

}  // namespace gk
