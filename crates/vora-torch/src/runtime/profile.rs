//! Every operator that runs, by libtorch's profiler.

use std::ffi::CString;
use std::path::Path;
use std::ptr;

use anyhow::{Context, Result};

use crate::ffi;

/// Does `run`, and writes each operator of this thread's and its backward's into `path`, with its time and the shapes of what it
/// was given: a trace for Chrome, as PyTorch's profiler writes it. This crate's own kernels stand there under `vora::`; those of
/// attention are given one number more, how many pairs of a query and a key each head has.
///
/// # Errors
/// Those of `run`, a profiler that runs already, and a file that cannot be written.
pub fn profiled<T>(path: &Path, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let file = path.to_str().with_context(|| format!("{} is no UTF-8", path.display()))?;
    let file = CString::new(file).with_context(|| format!("a null byte in {file:?}"))?;
    // SAFETY: it takes nothing.
    ffi::check(unsafe { ffi::vora_profile_start() })?;
    let done = run();
    let to = if done.is_ok() { file.as_ptr() } else { ptr::null() };
    // SAFETY: null, or a string that lives until the call returns.
    let stopped = ffi::check(unsafe { ffi::vora_profile_stop(to) });
    let done = done?;
    stopped.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::attention::{Band, Bands, Run, attention};
    use serde_json::Value;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn own_kernels_stand_in_the_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let q = Tensor::ones([2, 4, 3, 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let k = Tensor::ones([2, 2, 3, 16], (Kind::Float, Device::Cpu));
        let causal = Run { queries: 0..3, bands: vec![Band::causal(0..3)] };
        let bands = Bands::new(&[vec![causal.clone()], vec![causal]]).unwrap();
        profiled(&path, || {
            attention(&q, &k, &k, &bands).sum(Kind::Float).backward();
            Ok(())
        })
        .unwrap();
        let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        for name in ["vora::attention", "vora::attention_backward"] {
            let event = events.iter().find(|event| event["name"] == name).expect(name);
            assert_eq!(event["args"]["Input Dims"][1], serde_json::json!([2, 2, 3, 16]), "{event}");
            assert_eq!(event["args"]["Concrete Inputs"][3], "12", "{event}"); // 1 + 2 + 3 of each row
            assert!(event["dur"].as_f64().unwrap() > 0.0, "{event}");
        }
        assert!(events.iter().any(|event| event["name"] == "aten::sum"));

        let error = profiled::<()>(&path, || anyhow::bail!("nothing to do")).unwrap_err().to_string();
        assert_eq!(error, "nothing to do");
        profiled(&path, || Ok(())).unwrap(); // the failed one has ended
    }
}
