//! A Chameleon's image tokenizer, trained on the run's own pictures before its first step.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};
use vora_data::Source;
use vora_model::VQMODEL;
use vora_recipe::{Curve, LearningRates, OptimConfig, Schedule, SchedulerKwargs, TrainConfig};
use vora_torch::weights::Weights;
use vora_vision::VqModel;

use crate::run::progress::Progress;
use crate::step::optim::optimizer;
use vora_student::Student;

/// Bad records in a row that end the search for a picture.
const MAX_BAD_RECORDS: u64 = 100;

/// Steps over which an entry of the codebook has to be used once, or it is moved to where it will be.
const RESTART_EVERY: u64 = 10;

/// Share of the steps that goes by before there is a codebook.
const WITHOUT_CODES: f64 = 0.3;

/// Share of the steps after which unused entries are left alone, as the rate goes to 0.
const RESTARTS_END: f64 = 0.7;

/// Trains the tokenizer and copies it into the student's; nothing where the model has none, or where `stop` is set
/// before its end.
pub(crate) fn train(
    student: &Student,
    config: &TrainConfig,
    training: &dyn Source,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<()> {
    let Some(vq) = &config.model.vqmodel else { return Ok(()) };
    let weights = Weights::random(config.seed, student.device(), Kind::Float);
    let model = VqModel::load_trained(&vq.config(config.model.image_size), &weights.pp(VQMODEL))?;
    let optim = OptimConfig {
        learning_rate: vq.learning_rate,
        learning_rates: LearningRates::default(),
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        ..config.optim()
    };
    let mut optimizer = optimizer(weights.parameters(), &optim)?;
    let (warmup_steps, max_steps) = (vq.steps / 20, vq.steps);
    let schedule = Schedule { curve: Curve::Cosine, warmup_steps, max_steps, kwargs: SchedulerKwargs::default() };
    let first_with_codes = (WITHOUT_CODES * vq.steps as f64).ceil() as u64;
    let num_codes = vq.num_embeddings;
    let mut used = Tensor::zeros([num_codes], (Kind::Int64, student.device()));
    let mut index = 0;
    for step in 0..vq.steps {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let pictures = pictures(training, &mut index, vq.batch_size)?;
        optimizer.zero_grad()?;
        let pictures = Tensor::stack(&pictures, 0);
        let done = step as f64 / vq.steps as f64;
        let (loss, reconstruction) = if done < WITHOUT_CODES {
            let loss = model.reconstruction_without_codes(&pictures)?;
            (loss.shallow_clone(), loss)
        } else {
            if done < RESTARTS_END && (step - first_with_codes).is_multiple_of(RESTART_EVERY) {
                // At the first of them all are unused.
                model.restart_codes(&used.eq(0).nonzero().flatten(0, -1), &pictures)?;
                let _ = used.zero_();
            }
            let losses = model.losses(&pictures)?;
            used += losses.codes.flatten(0, -1).bincount(None::<&Tensor>, num_codes);
            (&losses.reconstruction + losses.quantization, losses.reconstruction)
        };
        loss.backward();
        // The one place where the host waits for the device.
        let read = Tensor::stack(&[loss, optimizer.grad_norm()?, reconstruction], 0).to_kind(Kind::Double);
        let read = Vec::<f64>::try_from(read)?;
        let (loss, grad_norm, reconstruction) = (read[0], read[1], read[2]);
        ensure!(grad_norm.is_finite(), "step {} of the image tokenizer is not finite (loss {loss})", step + 1);
        optimizer.step(schedule.factor(step), grad_norm)?;
        progress.tokenizer_step(step + 1, vq.steps, reconstruction);
    }
    for ((name, trained), (own_name, own)) in weights.parameters().iter().zip(student.made()) {
        ensure!(name == own_name, "the image tokenizer has `{name}` where the model has `{own_name}`");
        tch::no_grad(|| own.shallow_clone().copy_(trained));
    }
    Ok(())
}

/// The next `count` pictures of one size, each `[3, height, width]`, from `index` on.
fn pictures(training: &dyn Source, index: &mut u64, count: u64) -> Result<Vec<Tensor>> {
    let (mut pictures, mut bad) = (Vec::<Tensor>::new(), 0);
    while (pictures.len() as u64) < count {
        let at = training.len().map_or(*index, |len| *index % len.max(1));
        *index += 1;
        let before = pictures.len();
        let sample = training.sample(at);
        for image in sample.iter().flat_map(|sample| &sample.images) {
            let picture = vora_vision::pixel_values(image);
            if pictures.first().is_none_or(|first| first.size() == picture.size()) {
                pictures.push(picture);
            }
        }
        bad = if pictures.len() == before { bad + 1 } else { 0 };
        if bad == MAX_BAD_RECORDS {
            sample.context("a hundred records in a row without a picture for the image tokenizer")?;
            anyhow::bail!("a hundred records in a row without a picture for the image tokenizer");
        }
    }
    pictures.truncate(usize::try_from(count)?);
    Ok(pictures)
}
