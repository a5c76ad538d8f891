//! Backward passes from a gradient that is given.

use anyhow::Result;
use tch::Tensor;

use crate::ffi;

/// Runs the backward pass of `tensor` from `gradient`, the derivative by it, and adds what the leaves get to their gradients.
///
/// # Errors
/// Where no leaf that `tensor` depends on requires a gradient, or the two differ in shape.
pub fn backward(tensor: &Tensor, gradient: &Tensor) -> Result<()> {
    // SAFETY: two live tensors.
    ffi::check(unsafe { ffi::vora_backward(tensor.as_ptr(), gradient.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backward_starts_from_the_gradient_given() {
        let x = Tensor::from_slice(&[1f32, 2.0, 3.0]).set_requires_grad(true);
        for _ in 0..2 {
            backward(&x.square(), &Tensor::from_slice(&[1f32, 10.0, 100.0])).unwrap();
        }
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [4.0, 80.0, 1200.0]);
        let error = backward(&x.detach(), &x).unwrap_err().to_string();
        assert!(error.contains("does not require grad"), "{error}");
    }
}
