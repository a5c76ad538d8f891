//! What this process holds, and the machine that it runs on.

use tch::Device;

use crate::ffi;

/// The machine in words: its processor where the system tells it (Linux), threads, and the device of the tensors.
pub fn machine(device: Device) -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    let device = match device {
        Device::Cpu => "CPU".to_owned(),
        other => format!("{other:?}"),
    };
    format!("{model}, {} threads; tensors on {device}", tch::get_num_threads())
}

/// The most memory so far in bytes: the process's resident size on the CPU, where the system tells it (Linux); what its
/// tensors held on a GPU.
pub fn peak_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => process_size("VmHWM:"),
        _ => gpu_memory(device).map(|memory| memory.peak_allocated),
    }
}

/// Memory now, as [`peak_memory`] counts it.
pub fn memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => process_size("VmRSS:"),
        _ => gpu_memory(device).map(|memory| memory.allocated),
    }
}

/// What Linux's `/proc/self/status` says of the process under `key`, in bytes.
pub fn process_size(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = status.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix("kB")?;
    Some(kibibytes.trim().parse::<u64>().ok()? * 1024)
}

/// Gives memory that was freed back to the system, where that is glibc's business: it keeps all of it for what is asked for next
/// with the settings of [`missing_environment`](super::missing_environment), so what opening a model took stays with the process.
pub fn release_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: it touches free memory alone. Whether any was given back makes no difference.
        let _ = unsafe { ffi::malloc_trim(0) };
    }
}

/// Memory of a GPU as libtorch's allocator counts it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct GpuMemory {
    /// Held by tensors now (`torch.cuda.memory_allocated`).
    pub allocated: u64,
    /// Held by tensors at most so far (`torch.cuda.max_memory_allocated`).
    pub peak_allocated: u64,
    /// That this process may still take: free on the GPU, or kept by the allocator for the next tensors.
    pub available: u64,
}

/// Memory of the GPU that `device` is; none for the CPU, and before the first tensor was made on a GPU.
pub fn gpu_memory(device: Device) -> Option<GpuMemory> {
    let Device::Cuda(index) = device else { return None };
    let mut memory = GpuMemory::default();
    let (mut reserved, mut free) = (0, 0);
    // SAFETY: four numbers to write to; an index that no GPU has is an error of libtorch's.
    let status = unsafe {
        ffi::vora_cuda_memory(
            i8::try_from(index).ok()?,
            &mut memory.allocated,
            &mut memory.peak_allocated,
            &mut reserved,
            &mut free,
        )
    };
    memory.available = free + reserved.saturating_sub(memory.allocated);
    (status == 0).then_some(memory)
}
