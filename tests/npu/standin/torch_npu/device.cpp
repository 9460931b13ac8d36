// A stand-in for an Ascend NPU: host memory that torch knows as the device `npu`.
//
// Operators run on the CPU through a boxed fallback, which refuses what an NPU refuses (float64
// products and reductions; with TORCH_NPU_FALLBACK_CPU_DISABLE=1 operators without an NPU kernel
// and float64 tensors as well), and counts what runs. Inside of a marked region it counts
// synchronisations with the host and refuses shapes that depend on data. `hccl` is gloo on the same
// memory, without what HCCL does not reduce.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using c10::DeviceIndex;
using c10::DeviceType;
constexpr auto kNpu = DeviceType::PrivateUse1;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

const std::set<std::string> kNoFloat64 = {
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "dot", "vdot", "sum",
    "mean", "prod", "norm", "linalg_vector_norm", "var", "std", "cumsum", "cumprod", "logsumexp",
    "_softmax", "_log_softmax"};

// The dispatcher of torch_npu 2.13.0 has no kernel for them.
const std::set<std::string> kNoKernel = {
    "_linalg_eigh", "_linalg_eigvals", "linalg_eig", "linalg_eigvals", "geqrf",
    "linalg_householder_product", "ormqr", "lu_factor_ex", "linalg_lu_factor_ex", "linalg_inv_ex",
    "_linalg_solve_ex", "linalg_lstsq", "_linalg_det", "linalg_pinv", "linalg_matrix_exp",
    "linalg_cholesky_ex", "_grouped_mm"};

const std::set<std::string> kShapeFromData = {
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave"};

bool strict() {
  static const char* value = std::getenv("TORCH_NPU_FALLBACK_CPU_DISABLE");
  return value != nullptr && std::string(value) == "1";
}

DeviceIndex device_count() {
  static const char* value = std::getenv("NPU_STANDIN_DEVICES");
  return value == nullptr ? 8 : static_cast<DeviceIndex>(std::atoi(value));
}

std::mutex counting;
std::map<std::string, int64_t> calls, synchronisations;
std::atomic<bool> marked{false};
thread_local int inside_fallback = 0;
thread_local DeviceIndex current = 0;

void note_synchronisation(const std::string& what) {
  if (marked && inside_fallback == 0) {
    std::lock_guard<std::mutex> lock(counting);
    synchronisations[what] += 1;
  }
}

void refuse_float64(at::ScalarType type) {
  TORCH_CHECK(
      !(strict() && type == at::kDouble), "stand-in NPU: a float64 tensor reaches the device");
}

// The same memory as a tensor of the CPU.
at::Tensor host(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) {
    return tensor;
  }
  auto found = at::for_blob(tensor.data_ptr(), tensor.sizes())
                   .strides(tensor.strides())
                   .deleter([tensor](void*) {})
                   .options(tensor.options().device(at::kCPU))
                   .make_tensor();
  found._set_conj(tensor.is_conj());
  found._set_neg(tensor.is_neg());
  return found;
}

// --- memory and devices ---------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, c10::Device(kNpu, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &c10::free_cpu;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kNpu, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override {
    return kNpu;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return {kNpu, current};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "there is no ", device);
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = device.index() < 0 ? current : device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream;
  }
  DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }
  void synchronizeDevice(const DeviceIndex) const override {
    note_synchronisation("synchronize");
  }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return device_count();
  }
  void setCurrentDevice(DeviceIndex device) const override {
    Guard().setDevice({kNpu, device});
  }
  DeviceIndex getCurrentDevice() const override {
    return current;
  }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice({kNpu, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? current : exchangeDevice(device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    memory.copy_data(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// --- kernels ----------------------------------------------------------------------------------

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const auto type = c10::dtype_or_default(dtype);
  refuse_float64(type);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &memory, kKeys, type, format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  refuse_float64(type);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, type);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  if (to.device().is_cpu()) {
    note_synchronisation("copy to the host");
  }
  host(to).copy_(host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) {
    to.resize_(self.sizes());
  }
  return copy_from(self, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  note_synchronisation("_local_scalar_dense");
  return host(self).item();
}

// As torch_npu: a dtype alone is turned from float64 into float32, without an error.
at::Tensor to_copy(
    const at::Tensor& self,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device> device,
    std::optional<bool> pinned,
    bool non_blocking,
    std::optional<at::MemoryFormat> format) {
  if (dtype == at::kDouble && !device.has_value()) {
    TORCH_WARN_ONCE("Device do not support double dtype now, dtype cast replace with float.");
    dtype = at::kFloat;
  }
  return at::native::_to_copy(self, dtype, layout, device, pinned, non_blocking, format);
}

const at::Tensor& resize(
    const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto bytes = at::detail::computeStorageNbytesContiguous(
      size, self.dtype().itemsize(), self.storage_offset());
  if (self.storage().nbytes() < bytes) {
    at::native::resize_bytes_nocuda(self.storage(), bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

bool is_mask(const c10::IValue& value) {
  if (!value.isTensor() || !value.toTensor().defined()) {
    return false;
  }
  const auto type = value.toTensor().scalar_type();
  return type == at::kBool || type == at::kByte;
}

bool has_mask_index(const std::string& name, const torch::jit::Stack* stack, size_t arguments) {
  if (name != "index_put" && name != "_index_put_impl") {
    return false;  // torch makes indices of the masks that it reads with, by nonzero
  }
  for (const auto& value : torch::jit::last(*stack, arguments)) {
    if (!value.isList()) {
      continue;
    }
    for (const c10::IValue& element : value.toListRef()) {
      if (is_mask(element)) {
        return true;
      }
    }
  }
  return false;
}

void refuse(const std::string& name, torch::jit::Stack* stack, size_t arguments) {
  TORCH_CHECK(
      !(strict() && kNoKernel.count(name)),
      "stand-in NPU: ", name, " has no NPU kernel, and falling back to the CPU is disabled");
  if (name == "equal") {
    note_synchronisation(name);
  }
  TORCH_CHECK(
      !(marked && (kShapeFromData.count(name) || has_mask_index(name, stack, arguments))),
      "stand-in NPU: the shape of the result of ", name, " depends on data");
  if (!kNoFloat64.count(name)) {
    return;
  }
  for (const auto& value : torch::jit::last(*stack, arguments)) {
    const bool found = (value.isTensor() && value.toTensor().defined() &&
                        value.toTensor().scalar_type() == at::kDouble);
    TORCH_CHECK(
        !found, "stand-in NPU: ", name,
        " not implemented for DT_DOUBLE, should be in dtype support list [DT_FLOAT, DT_FLOAT16, "
        "DT_BFLOAT16]");
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::string name = op.schema().name().substr(std::string("aten::").size());
  if (name.size() > 1 && name.back() == '_') {
    name.pop_back();
  }
  if (inside_fallback == 0) {
    refuse(name, stack, op.schema().arguments().size());
    std::lock_guard<std::mutex> lock(counting);
    calls[name] += 1;
  }
  inside_fallback += 1;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    inside_fallback -= 1;
    throw;
  }
  inside_fallback -= 1;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("_to_copy", to_copy);
  m.impl("resize_", resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  // torch would make a loop of it, which an NPU does not run either.
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// A copy resolves conjugate and negative views itself; torch's fallbacks would copy without end.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// Autocast of the real device computes in 16 bits; here every type stays as it is.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// --- hccl ---------------------------------------------------------------------------------------

std::vector<at::Tensor> host(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> found;
  for (const auto& tensor : tensors) {
    found.push_back(host(tensor));
  }
  return found;
}

std::vector<std::vector<at::Tensor>> host(const std::vector<std::vector<at::Tensor>>& lists) {
  std::vector<std::vector<at::Tensor>> found;
  for (const auto& tensors : lists) {
    found.push_back(host(tensors));
  }
  return found;
}

void check_reducible(const at::Tensor& tensor) {
  static const std::set<at::ScalarType> supported = {
      at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf, at::kFloat, at::kBFloat16};
  TORCH_CHECK(
      supported.count(tensor.scalar_type()),
      "HCCL: Unsupported data type at::", tensor.scalar_type(), " in a reduction");
}

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

class Hccl : public c10d::Backend {
 public:
  Hccl(c10::intrusive_ptr<c10d::Backend> gloo, std::string name)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)), name_(std::move(name)) {}

  const std::string getBackendName() const override {
    return "hccl";
  }
  // Who asks for the name hands the communicator to fused operators, beside which none may use it.
  std::string comm_name(int) {
    fused_ = true;
    return name_;
  }
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto mine = own(tensors);
    return gloo_->broadcast(mine, options);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    check_reducible(tensors[0]);
    auto mine = own(tensors);
    return gloo_->allreduce(mine, options);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    check_reducible(tensors[0]);
    auto mine = own(tensors);
    return gloo_->reduce(mine, options);
  }
  WorkPtr allgather(
      std::vector<Tensors>& to, Tensors& from, const c10d::AllgatherOptions& options) override {
    auto mine_to = own(to);
    auto mine_from = own(from);
    return gloo_->allgather(mine_to, mine_from, options);
  }
  WorkPtr _allgather_base(
      at::Tensor& to, at::Tensor& from, const c10d::AllgatherOptions& options) override {
    auto mine_to = own(to), mine_from = own(from);
    return gloo_->_allgather_base(mine_to, mine_from, options);
  }
  WorkPtr reduce_scatter(
      Tensors& to, std::vector<Tensors>& from, const c10d::ReduceScatterOptions& options) override {
    check_reducible(to[0]);
    auto mine_to = own(to);
    auto mine_from = own(from);
    return gloo_->reduce_scatter(mine_to, mine_from, options);
  }
  WorkPtr _reduce_scatter_base(
      at::Tensor& to, at::Tensor& from, const c10d::ReduceScatterOptions& options) override {
    check_reducible(to);
    auto mine_to = own(to), mine_from = own(from);
    return gloo_->_reduce_scatter_base(mine_to, mine_from, options);
  }
  WorkPtr alltoall_base(
      at::Tensor& to,
      at::Tensor& from,
      std::vector<int64_t>& to_sizes,
      std::vector<int64_t>& from_sizes,
      const c10d::AllToAllOptions& options) override {
    auto mine_to = own(to), mine_from = own(from);
    return gloo_->alltoall_base(mine_to, mine_from, to_sizes, from_sizes, options);
  }
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto mine = own(tensors);
    return gloo_->send(mine, to, tag);
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto mine = own(tensors);
    return gloo_->recv(mine, from, tag);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    auto own = options;
    own.device = at::Device(at::kCPU);
    return gloo_->barrier(own);
  }

 private:
  template <class T>
  T own(const T& tensors) const {
    TORCH_CHECK(!fused_, "HCCL: communicator ", name_, " belongs to the fused operators");
    return host(tensors);
  }
  c10::intrusive_ptr<c10d::Backend> gloo_;
  std::string name_;
  bool fused_ = false;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("device_count", [] { return static_cast<int>(device_count()); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int index) { hooks.setCurrentDevice(static_cast<DeviceIndex>(index)); });
  m.def("mark", [](bool value) { return marked.exchange(value); });
  m.def("calls", [] { return calls; });
  m.def("synchronisations", [] { return synchronisations; });
  m.def("forget", [] {
    calls.clear();
    synchronisations.clear();
  });
  py::class_<Hccl, c10::intrusive_ptr<Hccl>, c10d::Backend>(m, "Hccl")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>, std::string>())
      .def("get_hccl_comm_name", &Hccl::comm_name);
}
