//! What this process holds, and the machine that it runs on.

use tch::Device;

use crate::runtime::gpu_memory;

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
        Device::Cpu => status("VmHWM:"),
        _ => gpu_memory(device).map(|memory| memory.peak_allocated),
    }
}

/// Memory now, as [`peak_memory`] counts it.
pub fn memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => status("VmRSS:"),
        _ => gpu_memory(device).map(|memory| memory.allocated),
    }
}

/// A size in `/proc/self/status`.
pub fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = status.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix("kB")?;
    Some(kibibytes.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn peak_memory_grows_with_what_is_held() {
        let before = peak_memory(Device::Cpu).unwrap();
        let held = vec![1u8; 64 << 20];
        let after = peak_memory(Device::Cpu).unwrap();
        assert_eq!(held.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 64 << 20);
        assert!(before > 1 << 20 && after >= before, "{before} {after}");
        assert!(after > 64 << 20, "{after}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_is_below_its_peak() {
        let (now, peak) = (memory(Device::Cpu).unwrap(), peak_memory(Device::Cpu).unwrap());
        assert!(now > 1 << 20 && now <= peak, "{now} {peak}");
    }
}
