//! Where tensors live and in which dtype: one program for CPU and CUDA machines.

use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::Once;

use anyhow::{Context, Result, bail, ensure};
use tch::{Cuda, Device, Kind};

use crate::ffi;

/// Opens libtorch's CUDA library if it lies beside the `libtorch_cpu` that is loaded.
///
/// The program itself links only the CPU half, so that it starts on any machine. Must come before the first
/// question about CUDA, whose answer libtorch keeps; every function here calls it, so a program that chooses
/// its device with [`device`] need not.
pub fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(target_os = "linux")]
        if let Some(library) = cuda_library() {
            // SAFETY: a NUL-terminated path; the handle stays open for the life of the process. Where the driver
            // or a CUDA library is missing dlopen returns null, and CUDA then answers "not available".
            unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        }
    });
}

/// `libtorch_cuda.so` in the folder that really holds the loaded `libtorch_cpu.so` (links resolved): both must
/// come from the same build.
#[cfg(target_os = "linux")]
fn cuda_library() -> Option<CString> {
    let cuda = loaded_libtorch()?.canonicalize().ok()?.with_file_name("libtorch_cuda.so");
    cuda.exists().then(|| CString::new(cuda.to_string_lossy().as_bytes()).ok())?
}

/// The `libtorch_cpu.so` that is loaded, by the path that the loader took.
#[cfg(target_os = "linux")]
pub(crate) fn loaded_libtorch() -> Option<PathBuf> {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: dlsym looks up a name that libtorch_cpu defines (`at::globalContext`) in what is loaded; dladdr fills
    // `info` or returns 0.
    let found = unsafe {
        let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"_ZN2at13globalContextEv".as_ptr());
        !symbol.is_null() && libc::dladdr(symbol, &mut info) != 0
    };
    if !found || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr returned a NUL-terminated path.
    Some(PathBuf::from(unsafe { CStr::from_ptr(info.dli_fname) }.to_str().ok()?))
}

/// The device that a user asked for: `auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:1`.
///
/// # Errors
/// Where the name is unknown, or this machine has no such GPU.
pub fn device(spec: &str) -> Result<Device> {
    init();
    let gpus = || usize::try_from(Cuda::device_count()).unwrap_or(0);
    match spec {
        "auto" => Ok(Device::cuda_if_available()),
        "cpu" => Ok(Device::Cpu),
        _ => {
            let index = match spec.strip_prefix("cuda") {
                Some("") => 0,
                Some(rest) => match rest.strip_prefix(':').and_then(|i| i.parse().ok()) {
                    Some(index) => index,
                    None => bail!("device `{spec}` is not one of auto, cpu, cuda, cuda:N"),
                },
                None => bail!("device `{spec}` is not one of auto, cpu, cuda, cuda:N"),
            };
            ensure!(
                Cuda::is_available() && index < gpus(),
                "device `{spec}`: libtorch sees {} GPUs here; `cargo xtask setup --cuda` fetches its CUDA libraries, \
                 and the machine needs an NVIDIA driver",
                gpus()
            );
            Ok(Device::Cuda(index))
        }
    }
}

/// The dtype of frozen weights and activations. `auto` is what `VORA_DTYPE` in the environment names; where it is not
/// set, bf16 on hardware that multiplies it, else f32.
///
/// # Errors
/// Where the name is unknown, or the device does not compute in it.
pub fn kind(spec: &str, device: Device) -> Result<Kind> {
    if spec == "auto" {
        return match std::env::var("VORA_DTYPE") {
            Ok(forced) if !forced.is_empty() && forced != "auto" => kind(&forced, device).context("VORA_DTYPE"),
            _ => Ok(if has_bf16(device) { Kind::BFloat16 } else { Kind::Float }),
        };
    }
    Ok(match spec {
        "f32" | "fp32" | "float32" | "float" => Kind::Float,
        "bf16" | "bfloat16" => Kind::BFloat16,
        "f16" | "fp16" | "float16" | "half" => {
            ensure!(device.is_cuda(), "dtype `{spec}` needs a GPU: libtorch has few f16 kernels for the CPU");
            Kind::Half
        }
        _ => bail!("dtype `{spec}` is not one of auto, bf16, f32, f16"),
    })
}

/// A dtype by the name that [`kind`] takes: `f32`, `bf16`, `f16`; libtorch's own for the others.
pub fn name_of(kind: Kind) -> String {
    match kind {
        Kind::Float => "f32".into(),
        Kind::BFloat16 => "bf16".into(),
        Kind::Half => "f16".into(),
        other => format!("{other:?}"),
    }
}

/// Whether bf16 matrix products are faster than f32's on `device`: on a GPU, and where a CPU has AMX, or AVX512-BF16 that
/// does more than its f32 units do.
pub fn has_bf16(device: Device) -> bool {
    match device {
        // SAFETY: asks the processor, touches nothing.
        Device::Cpu => unsafe { ffi::vora_cpu_has_bf16() == 1 },
        _ => true,
    }
}

/// Threads that libtorch uses inside one operator on the CPU.
pub fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

/// Sets them; libtorch's own number is the processor's, or `OMP_NUM_THREADS`.
pub fn set_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}

/// Waits until all work queued on `device` is done; a clock is read after this.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names() {
        assert_eq!(device("cpu").unwrap(), Device::Cpu);
        assert!(matches!(device("auto").unwrap(), Device::Cpu | Device::Cuda(0)));
        for wrong in ["gpu", "cuda:x", "cudax", ""] {
            let error = device(wrong).unwrap_err().to_string();
            assert!(error.contains("not one of auto, cpu, cuda, cuda:N"), "{error}");
        }
        let error = device("cuda:4096").unwrap_err().to_string();
        assert!(error.contains("libtorch sees"), "{error}");
    }

    #[test]
    fn kinds() {
        assert_eq!(kind("bf16", Device::Cpu).unwrap(), Kind::BFloat16);
        assert_eq!(kind("f32", Device::Cpu).unwrap(), Kind::Float);
        for name in ["f32", "fp32", "float32", "bf16", "bfloat16"] {
            let named = name_of(kind(name, Device::Cpu).unwrap());
            assert!(
                name.starts_with(&named[..1]) && kind(&named, Device::Cpu).unwrap() == kind(name, Device::Cpu).unwrap()
            );
        }
        assert!(kind("half", Device::Cpu).unwrap_err().to_string().contains("needs a GPU"));
        assert!(kind("f16", Device::Cpu).unwrap_err().to_string().contains("needs a GPU"));
        assert!(kind("int4", Device::Cpu).unwrap_err().to_string().contains("not one of"));
    }
}
