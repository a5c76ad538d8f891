//! Gradients of many tensors in one call: their norm, and scaling.

use anyhow::{Result, ensure};
use tch::Tensor;

use crate::ffi;

/// The 2-norm over all elements of all `grads`, as a 0-dim f32 tensor: nothing is copied to the host.
///
/// # Errors
/// Where there are none.
pub fn grad_norm(grads: &[Tensor]) -> Result<Tensor> {
    ensure!(!grads.is_empty(), "grad_norm of no tensors");
    let pointers = ffi::pointers(grads);
    // SAFETY: a list of live tensors.
    ffi::tensor(unsafe { ffi::vora_grad_norm(pointers.as_ptr(), pointers.len()) })
}

/// Multiplies all `tensors` by `factor`, in place and in one call; a factor of 0 makes zeros of whatever they hold.
///
/// # Errors
/// What libtorch says, as of tensors that cannot be changed in place.
pub fn scale(tensors: &[Tensor], factor: f64) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let pointers = ffi::pointers(tensors);
    // SAFETY: a list of live tensors.
    ffi::check(unsafe { ffi::vora_scale(pointers.as_ptr(), pointers.len(), factor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaled_in_place() {
        let tensors = [Tensor::from_slice(&[1f32, -2.0]), Tensor::from_slice(&[f32::NAN, 4.0])];
        scale(&tensors, 0.5).unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensors[0]).unwrap(), [0.5, -1.0]);
        assert_eq!(tensors[1].double_value(&[1]), 2.0);
        scale(&tensors, 0.0).unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensors[1]).unwrap(), [0.0, 0.0]);
        scale(&[], 2.0).unwrap();
    }

    #[test]
    fn grad_norm_spans_all_tensors() {
        let grads = [Tensor::from_slice(&[3f32, 0.0]), Tensor::from_slice(&[0f32, 4.0, 0.0])];
        assert_eq!(grad_norm(&grads).unwrap().double_value(&[]), 5.0);
        assert!(grad_norm(&[]).is_err());
    }
}
