//! What a student learns from: a frozen module with hidden states, block by block.

use std::fmt::Debug;

use tch::Tensor;
use vora_vision::Encoder;

/// A frozen module whose hidden states a student's blocks learn to tell (VoRA, arXiv 2503.20680, section 3.2): a vision
/// transformer of a folder, [`Encoder`], or one of the caller's own.
///
/// It is asked under `tch::no_grad`, and is given what the student is given: `pixel_values` as the run's processor made
/// them, in f32, on the student's device. One that was trained on pictures of another size or with other means has to bring
/// them there.
pub trait Teacher: Debug {
    /// Its blocks.
    fn num_hidden_layers(&self) -> usize;

    /// Channels of its hidden states.
    fn hidden_size(&self) -> i64;

    /// Rows and columns of what it sees of a picture. Where the student has others, its features are resampled.
    fn grid(&self, height: i64, width: i64) -> (i64, i64);

    /// `[n, 3, height, width]` -> what goes into the first block (index 0) and what comes out of each of the first
    /// `num_layers`, each `[n, rows * columns, hidden]`, row by row.
    fn patch_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor>;

    /// The place among [`patch_states`](Self::patch_states) of what its own class calls the first hidden state, for
    /// `distill.pairing: input`.
    fn first_hidden_state(&self) -> usize {
        0
    }

    /// Elements of its weights, for a plan.
    fn num_parameters(&self) -> u64 {
        0
    }
}

impl Teacher for Encoder {
    fn num_hidden_layers(&self) -> usize {
        self.num_hidden_layers()
    }

    fn hidden_size(&self) -> i64 {
        self.hidden_size()
    }

    fn grid(&self, height: i64, width: i64) -> (i64, i64) {
        (height / self.patch_size(), width / self.patch_size())
    }

    fn patch_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        self.patch_states(pixel_values, num_layers)
    }

    fn first_hidden_state(&self) -> usize {
        self.first_hidden_state()
    }

    fn num_parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, tensor)| tensor.numel() as u64).sum()
    }
}
