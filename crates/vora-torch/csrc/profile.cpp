// libtorch's profiler, which tells every operator with its time and the shapes of what it was given.

#include <torch/csrc/autograd/profiler_kineto.h>

#include "guard.h"

using torch::autograd::profiler::disableProfiler;
using torch::profiler::impl::ActivityType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;

extern "C" {

int vora_profile_start() {
  return guard(-1, [] {
    const ProfilerConfig config(ProfilerState::KINETO, /*report_input_shapes=*/true);
    torch::autograd::profiler::prepareProfiler(config, {ActivityType::CPU});
    torch::autograd::profiler::enableProfiler(config, {ActivityType::CPU}, {at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION});
    return 0;
  });
}

// Ends what was started on this thread, and writes it as a trace for Chrome where there is a path.
int vora_profile_stop(const char* path) {
  return guard(-1, [&] {
    const auto result = disableProfiler();
    if (path != nullptr) result->save(path);
    return 0;
  });
}

}  // extern "C"
