//! How much memory this process may still take.

use std::path::Path;

use tch::Device;

use super::memory::{gpu_memory, process_size};

/// Bytes that may still be taken: the least of what the machine has, what the cgroups above this process leave it, and
/// what its limit of address space does. None where the system does not tell (Linux does).
/// On a GPU what is free there.
pub fn available_memory(device: Device) -> Option<u64> {
    if device != Device::Cpu {
        return gpu_memory(device).map(|memory| memory.available);
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let machine = mem_available(&read("/proc/meminfo"));
    let limit = address_space(&read("/proc/self/limits"));
    let left = limit.map(|limit| limit.saturating_sub(process_size("VmSize:").unwrap_or(0)));
    [machine, left].into_iter().chain(cgroups(Path::new("/sys/fs/cgroup"), &read("/proc/self/cgroup"))).flatten().min()
}

/// Bytes of `MemAvailable` in `/proc/meminfo`.
fn mem_available(meminfo: &str) -> Option<u64> {
    let kibibytes = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.trim().strip_suffix("kB")?;
    Some(kibibytes.trim().parse::<u64>().ok()? * 1024)
}

/// The soft limit of `/proc/self/limits`; none where there is none.
fn address_space(limits: &str) -> Option<u64> {
    limits.lines().find_map(|line| line.strip_prefix("Max address space"))?.split_whitespace().next()?.parse().ok()
}

/// What each cgroup of the second version above this process leaves it; file pages, which give way, do not count.
fn cgroups(root: &Path, own: &str) -> Vec<Option<u64>> {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return Vec::new() };
    let left = |folder: &Path| {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok(); // `max` is none
        let files = read("memory.stat")?.lines().find_map(|line| line.strip_prefix("file ")?.parse::<u64>().ok());
        Some((number("memory.max")? + files.unwrap_or(0)).saturating_sub(number("memory.current")?))
    };
    root.join(path).ancestors().take_while(|folder| folder.starts_with(root)).map(left).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        assert_eq!(mem_available("MemFree: 1 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax address space         4096       unlimited    bytes\n";
        assert_eq!(address_space(limits), Some(4096));
        assert_eq!(address_space("Max address space         unlimited    unlimited    bytes\n"), None);
        #[cfg(target_os = "linux")]
        assert!(available_memory(Device::Cpu).unwrap() > 1 << 20);
    }

    #[test]
    fn the_narrowest_cgroup_counts() {
        let root = tempfile::tempdir().unwrap();
        let group = |path: &str, max: &str, current: u64| {
            let folder = root.path().join(path);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("memory.max"), max).unwrap();
            std::fs::write(folder.join("memory.current"), current.to_string()).unwrap();
            std::fs::write(folder.join("memory.stat"), "anon 5\nfile 100\n").unwrap();
        };
        group("", "max\n", 10_000);
        group("a", "1000\n", 300);
        group("a/b", "max\n", 200);
        assert_eq!(cgroups(root.path(), "0::/a/b\n").into_iter().flatten().min(), Some(800));
        assert!(cgroups(root.path(), "1:memory:/a\n").is_empty());
    }
}
