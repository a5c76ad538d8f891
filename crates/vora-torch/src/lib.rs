//! What libtorch has and tch lacks: runtime, strict safetensors, fused optimizer.
