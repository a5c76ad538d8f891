//! What is always the same in the teacher's features, measured before the first step.

use std::sync::Arc;

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_data::Source;
use vora_recipe::{ModelType, TrainConfig};

use vora_student::Student;

/// Looks at the first pictures of the training data through the teacher's eyes.
pub(super) fn measure_teacher(student: &mut Student, config: &TrainConfig, training: &Arc<dyn Source>) -> Result<()> {
    let (device, image_size) = (student.device(), student.image_size());
    let Some(distill) = &mut student.distill else {
        let may_have_one = !matches!(config.model.model_type, ModelType::Llava | ModelType::Chameleon);
        ensure!(
            !(config.distill.center && may_have_one),
            "distill.center is true, but model.aux_vision names no teacher, and none was given along"
        );
        return Ok(());
    };
    let mut pictures: Vec<Tensor> = Vec::new();
    let tries = training.len().unwrap_or(u64::MAX).min(4 * config.distill.mean_over as u64);
    for index in 0..tries {
        let Ok(sample) = training.sample(index) else { continue };
        pictures.extend(sample.images.iter().map(vora_vision::pixel_values));
        if pictures.len() >= config.distill.mean_over {
            break;
        }
    }
    if pictures.len() < 2 {
        ensure!(!config.distill.center, "distill.center needs pictures, the data has too few");
        return Ok(());
    }
    let batches: Vec<Tensor> = pictures
        .chunk_by(|a, b| a.size() == b.size())
        .flat_map(|same| same.chunks(config.per_device_eval_batch_size))
        .map(|chunk| Tensor::stack(chunk, 0).to_device(device))
        .collect();
    distill.measure_mean(&batches, image_size, config.distill.center)
}
