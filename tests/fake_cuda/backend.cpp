// A CUDA backend that does nothing, for a CPU build of torch.
//
// Tensors on `cuda:0` then pass every device check of the dispatcher and of autograd; their values are the affair of
// FakeTensorMode. Both registries are read once, so the library is loaded before `import torch`.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kOnly = 0;

struct IdleGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device here() const {
    return {c10::DeviceType::CUDA, kOnly};
  }
  c10::Stream only() const {
    return c10::Stream(c10::Stream::DEFAULT, here());
  }
  c10::Device getDevice() const override {
    return here();
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return here();
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return only();
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return only();
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return only();
  }
};

} // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)
}

namespace at {

// The registry looks for a class of this name.
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool hasCUDA() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return kOnly;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

} // namespace at
