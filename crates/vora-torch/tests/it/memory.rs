//! What a process holds: counted, given back.

use tch::{Device, Kind, Tensor};
use vora_torch::checkpoint::{Checkpoint, forget_files, save};
use vora_torch::runtime::{device, gpu_memory, memory, peak_memory, process_size, release_freed};

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

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn what_was_freed_goes_back() {
    let anonymous = || process_size("RssAnon:").unwrap();
    let mut pieces: Vec<Vec<u8>> = (0..4096).map(|_| vec![1; 32 << 10]).collect(); // 128 MiB
    let last = pieces.pop(); // above all others, so that glibc keeps what lies below
    drop(pieces);
    let before = anonymous();
    release_freed();
    let after = anonymous();
    assert!(after + (64 << 20) < before, "{after} bytes of {before}");
    assert_eq!(last.map(|piece| piece.len()), Some(32 << 10));
}

#[test]
fn memory_of_a_gpu() {
    assert_eq!(gpu_memory(Device::Cpu), None);
    let device = device("auto").unwrap();
    if device == Device::Cpu {
        return; // nothing more to see without a GPU
    }
    let held = Tensor::zeros([1 << 20], (Kind::Float, device));
    let memory = gpu_memory(device).unwrap();
    assert!(memory.allocated >= 4 << 20 && memory.peak_allocated >= memory.allocated && memory.available > 0);
    drop(held);
    assert!(gpu_memory(device).unwrap().allocated < memory.allocated);
}

#[test]
#[cfg(target_os = "linux")]
fn files_that_are_forgotten_take_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let value = Tensor::ones([96 << 18], (Kind::Float, Device::Cpu)); // 96 MiB
    save(&path, &[("w".into(), value)], &[]).unwrap();
    let view = Checkpoint::open(&path).unwrap().tensor("w").unwrap();
    assert_eq!(view.sum(Kind::Float).double_value(&[]), f64::from(96 << 18));
    let read = process_size("RssFile:").unwrap();
    forget_files();
    let left = process_size("RssFile:").unwrap();
    assert!(left + (64 << 20) < read, "{left} of {read} bytes are left");
}
