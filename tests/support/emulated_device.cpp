// Two devices of type CUDA in main memory, for a build of torch that has none.
//
// Every operation that torch has no kernel of its own for falls to `compute`, which says what a GPU would have been
// asked for, refuses what it would refuse, and lets the processor do it on the same memory. Views and copies stand below
// it. An allocator counts bytes by device. What is seen here are launches, waits and places, not kernels.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IntArrayRef;
using c10::MemoryFormat;
using c10::ScalarType;
template <typename T>
using Maybe = std::optional<T>;

namespace {

constexpr int COUNT = 2;
thread_local DeviceIndex current = 0;
thread_local int inside = 0;  // what the processor does for an operation is no further one

std::mutex lock;
bool recording = false, narrow = false;
std::atomic<int> sync_mode = 0;  // of torch.cuda.set_sync_debug_mode: 1 warns of a wait, 2 refuses it
std::string events;
std::atomic<long> held[COUNT], peak[COUNT];

void say(const std::string& name, const std::string& what) {
  if (inside) return;
  if (sync_mode && what.rfind("wait", 0) == 0) {  // as CUDA says it
    TORCH_CHECK(sync_mode == 1, "called a synchronizing CUDA operation");
    TORCH_WARN("called a synchronizing CUDA operation");
  }
  if (!recording) return;
  std::lock_guard<std::mutex> guard(lock);
  events += name + "\t" + what + "\n";
}

struct Inside {
  Inside() { inside++; }
  ~Inside() { inside--; }
};

struct On {  // a device, for the length of a block
  DeviceIndex before = current;
  explicit On(DeviceIndex index) {
    if (index >= 0) current = index;
  }
  ~On() { current = before; }
};

// ---------------------------------------------------------------------------------------------------- memory

struct Header {
  size_t bytes;
  DeviceIndex device;
};
constexpr size_t LINE = 64;

void release(void* place) {
  if (place == nullptr) return;
  auto* header = reinterpret_cast<Header*>(static_cast<char*>(place) - LINE);
  held[header->device] -= header->bytes;
  std::free(header);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Device device(DeviceType::CUDA, current);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    auto* start = static_cast<char*>(std::aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE + LINE));
    *reinterpret_cast<Header*>(start) = {bytes, current};
    long now = held[current] += bytes, most = peak[current];
    while (now > most && !peak[current].compare_exchange_weak(most, now)) {
    }
    return {start + LINE, start + LINE, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;

void has_it(Maybe<ScalarType> dtype) {  // as MPS says it
  TORCH_CHECK_TYPE(!(narrow && dtype == ScalarType::Double),
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.");
}

Tensor empty(IntArrayRef size, Maybe<ScalarType> dtype, Maybe<c10::Layout>, Maybe<Device> device, Maybe<bool>,
             Maybe<MemoryFormat> format) {
  has_it(dtype);
  On on(device ? device->index() : -1);
  auto type = dtype.value_or(c10::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::CUDA), type, format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Maybe<ScalarType> dtype, Maybe<c10::Layout>,
                     Maybe<Device> device, Maybe<bool>) {
  has_it(dtype);
  On on(device ? device->index() : -1);
  auto type = dtype.value_or(c10::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(size, stride, &memory, DispatchKeySet(DispatchKey::CUDA), type);
}

Tensor as_processor(const Tensor& t) {  // the same memory
  if (!t.is_cuda()) return t;
  auto options = at::TensorOptions().dtype(t.scalar_type()).device(at::kCPU);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  auto seen = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), options);
  if (t.is_neg()) seen = seen._neg_view();
  return t.is_conj() ? seen._conj() : seen;
}

// ---------------------------------------------------------------------------------------------------- copies, views

Tensor& copy(Tensor& to, const Tensor& from, bool async) {
  bool up = to.is_cuda(), down = from.is_cuda();
  if (up && down) {
    say("copy_", to.device() == from.device() ? "launch" : "peer");
  } else {
    say("copy_", (async ? "async " : "wait ") + std::string(up ? "to" : "from") + " " + std::to_string(from.nbytes()));
  }
  Inside quiet;
  as_processor(to).copy_(as_processor(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Inside quiet;
  as_processor(to).copy_(as_processor(from));
  return to;
}

const Tensor& grow(const Tensor& t, IntArrayRef size, Maybe<MemoryFormat>) {
  size_t count = 1;
  for (auto each : size) count *= each;
  auto storage = t.storage();
  size_t needed = (count + t.storage_offset()) * t.itemsize();
  if (storage.nbytes() < needed) {
    On on(t.device().index());
    auto grown = memory.allocate(needed);
    if (storage.nbytes()) std::memcpy(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(needed);
  }
  if (t.sizes() != size) t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return t;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  grow(to, from.sizes(), {});
  return copy_from(from, to, false);
}

Tensor strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, Maybe<int64_t> offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(),
                                                       t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(t.storage_offset()));
  return made;
}

Tensor view(const Tensor& t, IntArrayRef size) {
  auto whole = at::infer_size_dv(size, t.numel());
  auto stride = at::detail::computeStride(t.sizes(), t.strides(), whole);
  TORCH_CHECK(stride.has_value(), "view size is not compatible with input tensor's size and stride");
  return strided(t, whole, *stride, {});
}

Tensor reshape_alias(const Tensor& t, IntArrayRef size, IntArrayRef stride) { return strided(t, size, stride, {}); }

Tensor unfold(const Tensor& t, int64_t axis, int64_t size, int64_t step) {
  auto sizes = t.sizes().vec(), strides = t.strides().vec();
  axis = at::maybe_wrap_dim(axis, t.dim(), true);
  sizes.push_back(size);
  strides.push_back(strides[axis]);
  sizes[axis] = (sizes[axis] - size) / step + 1;
  strides[axis] *= step;
  return strided(t, sizes, strides, {});
}

Tensor& set_place(Tensor& t, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* own = t.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(std::move(storage));
  if (stride.empty() && !size.empty()) {
    own->set_sizes_contiguous(size);
    own->set_storage_offset(offset);
  } else {
    own->set_sizes_and_strides(size, stride, offset);
  }
  return t;
}

Tensor& set_storage(Tensor& t, at::Storage storage) {
  int64_t count = storage.nbytes() / t.itemsize();
  return set_place(t, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& t, const Tensor& other) {
  return set_place(t, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

// one launch on CUDA, which has a kernel for lists; torch's other way is a copy each
void cast_list(at::TensorList to, at::TensorList from, bool) {
  say("_foreach_copy_", "launch");
  Inside quiet;
  for (size_t i = 0; i < to.size(); i++) as_processor(to[i]).copy_(as_processor(from[i]));
}

// sums of 16-bit products in float32, which only CUDA has
Tensor& wide_sum(const Tensor& onto, const Tensor& left, const Tensor& right, ScalarType dtype, const at::Scalar& beta,
                 const at::Scalar& alpha, Tensor& out) {
  say("addmm.dtype", "launch");
  for (const Tensor& one : {onto, left, right})
    TORCH_CHECK(one.device() == out.device(), "Expected all tensors to be on the same device, addmm.dtype");
  Inside quiet;
  auto sum = beta.toDouble() == 0 ? Tensor() : as_processor(onto).to(dtype).mul(beta);
  auto product = at::mm(as_processor(left).to(dtype), as_processor(right).to(dtype)).mul(alpha);
  as_processor(out).copy_(sum.defined() ? sum + product : product);
  return out;
}

Tensor wide_sum_of(const Tensor& onto, const Tensor& left, const Tensor& right, ScalarType dtype,
                   const at::Scalar& beta, const at::Scalar& alpha) {
  auto out = at::empty({left.size(0), right.size(1)}, left.options().dtype(dtype));
  return wide_sum(onto, left, right, dtype, beta, alpha, out);
}

// counts of whole numbers, which only CUDA has

Tensor histc(const Tensor& t, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  say("histc", "launch");
  Tensor counts;
  {
    Inside quiet;
    counts = at::histc(as_processor(t).to(at::kFloat), bins, least, most).to(t.scalar_type());
  }
  return counts.to(t.device(), counts.scalar_type(), /*non_blocking=*/true);
}

// cells of recurrences, which only GPUs have in one kernel

Tensor moved(const Tensor& made, Device device) {
  auto out = at::empty_strided(made.sizes(), made.strides(), made.options().device(device));
  as_processor(out).copy_(made);
  return out;
}

Tensor gates_of(const Tensor& input, const Tensor& hidden, const Maybe<Tensor>& b1, const Maybe<Tensor>& b2) {
  auto sum = as_processor(input) + as_processor(hidden);
  return b1 && b1->defined() ? sum + as_processor(*b1) + as_processor(*b2) : sum;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden, const Tensor& before,
                                             const Maybe<Tensor>& b1, const Maybe<Tensor>& b2) {
  say("_thnn_fused_lstm_cell", "launch");
  Inside quiet;
  auto parts = gates_of(input, hidden, b1, b2).chunk(4, 1);
  auto i = parts[0].sigmoid(), f = parts[1].sigmoid(), g = parts[2].tanh(), o = parts[3].sigmoid();
  auto after = f * as_processor(before) + i * g;
  auto device = input.device();
  return {moved(o * after.tanh(), device), moved(after, device), moved(at::cat({i, f, g, o}, 1), device)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const Maybe<Tensor>& dh, const Maybe<Tensor>& dc,
                                                      const Tensor& before, const Tensor& after, const Tensor& gates,
                                                      bool bias) {
  if (!(dh && dh->defined()) && !(dc && dc->defined())) return {};
  say("_thnn_fused_lstm_cell_backward_impl", "launch");
  if (bias) say("sum", "launch");
  Inside quiet;
  auto c = as_processor(before), squashed = as_processor(after).tanh();
  auto parts = as_processor(gates).chunk(4, 1);
  auto i = parts[0], f = parts[1], g = parts[2], o = parts[3];
  auto h_part = dh && dh->defined() ? as_processor(*dh) : at::zeros_like(c);
  auto c_part = (dc && dc->defined() ? as_processor(*dc) : at::zeros_like(c)) + h_part * o * (1 - squashed * squashed);
  auto all = at::cat({c_part * g * i * (1 - i), c_part * c * f * (1 - f), c_part * i * (1 - g * g),
                      h_part * squashed * o * (1 - o)}, 1);
  auto device = before.device();
  return {moved(all, device), moved(c_part * f, device), bias ? moved(all.sum(0), device) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& before,
                                    const Maybe<Tensor>& b1, const Maybe<Tensor>& b2) {
  say("_thnn_fused_gru_cell", "launch");
  Inside quiet;
  auto x = as_processor(input), y = as_processor(hidden), h = as_processor(before);
  if (b1 && b1->defined()) x = x + as_processor(*b1), y = y + as_processor(*b2);
  auto xs = x.chunk(3, 1), ys = y.chunk(3, 1);
  auto r = (xs[0] + ys[0]).sigmoid(), z = (xs[1] + ys[1]).sigmoid(), n = (xs[2] + r * ys[2]).tanh();
  return {moved(n + z * (h - n), input.device()), moved(at::cat({r, z, n, h, ys[2]}, 1), input.device())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& dh, const Tensor& saved, bool bias) {
  say("_thnn_fused_gru_cell_backward", "launch");
  if (bias) say("sum", "launch"), say("sum", "launch");
  Inside quiet;
  auto d = as_processor(dh);
  auto parts = as_processor(saved).chunk(5, 1);
  auto r = parts[0], z = parts[1], n = parts[2], h = parts[3], y = parts[4];
  auto dz = d * (h - n) * (1 - z) * z, dn = d * (1 - z) * (1 - n * n), dr = dn * y * (1 - r) * r;
  auto dx = at::cat({dr, dz, dn}, 1), dy = at::cat({dr, dz, dn * r}, 1);
  auto device = dh.device();
  return {moved(dx, device), moved(dy, device), moved(d * z, device), bias ? moved(dx.sum(0), device) : Tensor(),
          bias ? moved(dy.sum(0), device) : Tensor()};
}

// ---------------------------------------------------------------------------------------------------- generators, hooks

struct Generator final : c10::GeneratorImpl {
  at::Generator own = at::detail::createCPUGenerator();
  explicit Generator(DeviceIndex index)
      : GeneratorImpl(Device(DeviceType::CUDA, index < 0 ? 0 : index), DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { own.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return own.current_seed(); }
  uint64_t seed() override { return own.seed(); }
  void set_state(const c10::TensorImpl& state) override { own.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return own.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new Generator(device().index()); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override {
    if (device.index() >= 0) current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(DeviceType::CUDA, device.index() < 0 ? current : device.index()));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
Guard guard;
c10::impl::DeviceGuardImplRegistrar guards(DeviceType::CUDA, &guard);

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  DeviceIndex deviceCount() const override { return COUNT; }
  int getNumGPUs() const override { return COUNT; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    auto before = current;
    if (index >= 0) current = index;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static at::Generator all[COUNT] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
    return all[index < 0 ? current : index];
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
};

// ---------------------------------------------------------------------------------------------------- operations

const std::set<std::string> INDEXED = {"index", "index_put_", "_index_put_impl_"};
const std::set<std::string> WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2",
                                     "unique_dim", "unique_consecutive"};

// The device of all tensors of a call; a CPU tensor without axes is a number, and CUDA takes indices from the processor
// (but the processor none from CUDA).
Maybe<Device> place_of(const std::string& name, const std::vector<Tensor>& tensors) {
  Maybe<Device> place;
  for (const Tensor& t : tensors) {
    bool is_index = INDEXED.count(name) && &t != &tensors[0];
    if (!t.defined() || (t.is_cpu() && (t.dim() == 0 || is_index))) continue;
    if (!place) place = t.device();
    TORCH_CHECK(*place == t.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
                *place, " and ", t.device(), "! (", name, ")");
  }
  return place;
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto name = schema.name().substr(schema.name().find("::") + 2);
  size_t count = schema.arguments().size(), first = stack->size() - count;
  std::vector<Tensor> tensors;
  bool by_mask = false;
  for (size_t i = first; i < stack->size(); i++) {
    const auto& one = (*stack)[i];
    size_t before = tensors.size();
    if (one.isTensor()) tensors.push_back(one.toTensor());
    else if (one.isTensorList()) for (const Tensor& t : one.toTensorVector()) tensors.push_back(t);
    else if (one.isOptionalTensorList()) {
      for (Maybe<Tensor> t : one.toOptionalTensorList()) if (t) tensors.push_back(*t);
      for (size_t k = before; k < tensors.size(); k++) by_mask |= tensors[k].defined() && tensors[k].scalar_type() == at::kBool;
    }
  }
  auto place = place_of(name, tensors);
  for (size_t i = first; i < stack->size(); i++) {
    if (!(*stack)[i].isGenerator() || !(*stack)[i].toGenerator().defined()) continue;
    auto given = (*stack)[i].toGenerator();
    TORCH_CHECK(given.device().is_cuda() || !place || !place->is_cuda(),
                "Expected a 'cuda' device type for generator but found 'cpu' (", name, ")");
    if (given.device().is_cuda()) (*stack)[i] = static_cast<Generator*>(given.unsafeGetGeneratorImpl())->own;
  }
  bool reads_counts = name == "repeat_interleave" && schema.overload_name() == "Tensor" && stack->back().isNone();
  say(name, WAITS.count(name) || reads_counts || (by_mask && name == "index") ? "wait" : "launch");
  Inside quiet;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

namespace at {
using EmulatedHooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, EmulatedHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("resize_", TORCH_FN(grow));
  m.impl("as_strided", TORCH_FN(strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("unfold", TORCH_FN(unfold));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_place));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("_foreach_copy_", TORCH_FN(cast_list));
  m.impl("addmm.dtype_out", TORCH_FN(wide_sum));
  m.impl("addmm.dtype", TORCH_FN(wide_sum_of));
  m.impl("histc", TORCH_FN(histc));
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&compute>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&compute>());
  m.impl("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
  m.impl("_thnn_fused_lstm_cell_backward_impl", TORCH_FN(lstm_cell_backward));
  m.impl("_thnn_fused_gru_cell", TORCH_FN(gru_cell));
  m.impl("_thnn_fused_gru_cell_backward", TORCH_FN(gru_cell_backward));
}

extern "C" {
int device_ready() { return at::detail::getCUDAHooks().hasCUDA(); }
void device_record() {
  std::lock_guard<std::mutex> guard(lock);
  events.clear();
  recording = true;
}
const char* device_events() {
  recording = false;
  return events.c_str();
}
long device_held(int index) { return held[index]; }
long device_peak(int index) { return peak[index]; }
void device_reset_peak() {
  for (int i = 0; i < COUNT; i++) peak[i] = held[i].load();
}
void device_narrow(int on) { narrow = on; }
void device_sync_mode(int mode) { sync_mode = mode; }
}
