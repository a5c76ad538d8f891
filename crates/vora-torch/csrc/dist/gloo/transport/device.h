// PyTorch's wheel has the header of its Gloo backend and none of Gloo's own: these declare as much of them as that header
// names. Objects of these types are only handed on, by pointers, so no layout is needed.
#pragma once

namespace gloo::transport {
class Device;
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};
}  // namespace gloo::transport
