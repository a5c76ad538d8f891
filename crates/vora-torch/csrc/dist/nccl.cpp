// The library `vora_nccl`, which `cargo xtask setup --cuda` builds against the headers of CUDA and NCCL.
#define USE_C10D_NCCL

#include "nccl.h"

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <cstdlib>
#include <string>

extern "C" __attribute__((visibility("default"))) AttachNccl vora_nccl_attach;

const char* vora_nccl_attach(c10d::ProcessGroup* group, const c10::intrusive_ptr<c10d::Store>* store, int device,
                             int64_t timeout_ms) {
  static thread_local std::string error;
  try {
    // Left to itself NCCL's watchdog ends the process where another is gone; who that is, and that all end, is told by ours.
    setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", /*overwrite=*/0);
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = std::chrono::milliseconds(timeout_ms);
    c10::intrusive_ptr<c10d::Store> for_nccl = c10::make_intrusive<c10d::PrefixStore>("nccl", *store);
    auto nccl =
        c10::make_intrusive<c10d::ProcessGroupNCCL>(for_nccl, group->getRank(), group->getSize(), std::move(options));
    group->setBoundDeviceId(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
    group->setBackend(c10::kCUDA, c10d::ProcessGroup::BackendType::NCCL, c10::intrusive_ptr<c10d::Backend>(nccl));
    return nullptr;
  } catch (const c10::Error& e) {
    error = e.what_without_backtrace();
  } catch (const std::exception& e) {
    error = e.what();
  } catch (...) {
    error = "unknown C++ exception";
  }
  return error.c_str();
}
