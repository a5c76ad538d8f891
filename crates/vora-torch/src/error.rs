//! libtorch's errors, as one line.

use tch::TchError;

/// The first line of what libtorch said: its text goes on with some thirty C++ frames.
pub fn first_line(error: &TchError) -> String {
    let text = match error {
        TchError::Torch(text) => text.clone(),
        other => other.to_string(),
    };
    text.lines().next().unwrap_or("libtorch gave no reason").to_owned()
}

/// Turns a [`TchError`] into an `anyhow` error of one line.
pub fn clean(error: TchError) -> anyhow::Error {
    anyhow::anyhow!(first_line(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn keeps_the_reason_and_drops_the_frames() {
        let a = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        let error = a.f_matmul(&a).unwrap_err();
        let line = first_line(&error);
        assert!(line.contains("mat1 and mat2"), "{line}");
        assert!(!line.contains('\n') && !line.contains("frame #"), "{line}");
    }
}
