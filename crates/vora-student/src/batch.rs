//! A batch as tensors.

use tch::{Device, Tensor};
use vora_data::Batch;
use vora_model::Input;

/// A batch as tensors on the device.
#[derive(Debug)]
pub struct DeviceBatch {
    /// What the model takes.
    pub input: Input,
    /// `[n]`: supervised places in `batch * seq`.
    pub positions: Tensor,
    /// `[n]`: the right token at each.
    pub targets: Tensor,
    /// How many of these the chosen and the rejected answer of each pair have, one pair after the other; empty where
    /// the samples are no pairs.
    pub pairs: Vec<[i64; 2]>,
    /// `[image tokens]`: places of patches in `batch * seq`.
    pub image_places: Tensor,
}

impl DeviceBatch {
    /// Uploads a batch.
    pub fn new(batch: &Batch, device: Device) -> Self {
        let supervised = batch.supervised();
        let list = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let input_ids = list(&batch.input_ids).view([batch.batch, batch.seq]);
        let pixel_values = batch.images.iter().map(|pixels| vora_vision::pixel_values(pixels).to_device(device));
        Self {
            input: Input::new(input_ids, pixel_values.collect(), batch.spans.clone()),
            positions: list(&supervised.positions),
            targets: list(&supervised.targets),
            pairs: batch.pairs(),
            image_places: list(&batch.spans.image_positions()),
        }
    }

    /// Patches of all pictures.
    pub fn num_image_tokens(&self) -> i64 {
        self.image_places.size()[0]
    }
}
