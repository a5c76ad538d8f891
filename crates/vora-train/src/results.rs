//! What a run came to, beside its accuracy: `train_results.json`, with HF `Trainer`'s keys where it has them.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Device;
use vora_torch::runtime::gpu_memory;
use vora_torch::safetensors::write_bytes;

/// The sums of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainResults {
    /// Steps done.
    pub steps: u64,
    /// Seconds that they took, evaluations and pauses between runs left out.
    pub train_runtime: f64,
    /// Steps a second.
    pub train_steps_per_second: f64,
    /// Elements of everything trained, what only training needs (distillation heads) included.
    pub trained_parameters: u64,
    /// The most memory that the last process of the run held at once, in bytes: on the CPU all of it, mapped weights
    /// included; on a GPU that of its tensors there. Absent where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// The machine of that process, in words; absent in runs of an older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The version of this library in that process; absent in runs of an older one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl TrainResults {
    /// Writes the file into a run folder.
    pub fn save(&self, run: &Path) -> Result<()> {
        write_bytes(&run.join("train_results.json"), serde_json::to_string_pretty(self)?.as_bytes())
    }
}

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
pub(crate) fn status(key: &str) -> Option<u64> {
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
