//! Runs of the tiny models.

mod anchored;
mod encoded_once;
mod few_bits;
mod own;
mod pictures;
mod preferring;
mod ranks;
mod refused;
mod resumed;
mod steps;
mod whole;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use vora_data::SampleMaker;
use vora_recipe::TrainConfig;
use vora_run::eval::EvalReport;
use vora_run::language::Language;
use vora_run::metrics::{EvalMetrics, EventKind, Line, MetricsLog, StepMetrics};

use super::{NotFinite, Options, Outcome, Trainer};
use crate::data;
use crate::observe::samples;
use crate::run::best::Best;
use crate::run::progress::Progress;
use crate::run::state::TrainerState;
use crate::step::loss_scale::LossScale;
use vora_image::ImageProcessor;
use vora_model::VisionLanguageModel;
use vora_run::checkpoint;
use vora_student::DeviceBatch;
use vora_torch::checkpoint::Checkpoint;

use crate::run::progress::Silent;
use vora_run::tensorboard;

fn resolve(name: &str) -> Result<PathBuf> {
    Ok(fixtures::root().parent().context("the workspace")?.join(name))
}

/// A recipe with the tiny models, in `folder`. smoke.yaml names no dtype: it computes in the tests' unless `overrides`
/// name another; debug.yaml is in f32.
fn config(recipe: &str, folder: &Path, overrides: &[&str]) -> TrainConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes").join(recipe);
    let mut all = vec![format!("output_dir={}", folder.display())];
    if recipe == "smoke.yaml" {
        all.push(format!("bf16={}", fixtures::dtype() == "bf16"));
    }
    all.extend(overrides.iter().map(|&entry| entry.to_owned()));
    TrainConfig::open(&path, &all).unwrap()
}

fn try_new(config: TrainConfig, resume: bool) -> Result<Trainer> {
    let options = Options { resume, ..Options::new(Device::Cpu, &resolve) };
    Trainer::new(config, options)
}

fn trainer(config: TrainConfig) -> Trainer {
    try_new(config, false).unwrap()
}

/// Copies, as the parameters themselves are trained on.
fn weights(trainer: &Trainer) -> Vec<(String, Tensor)> {
    let state = trainer.optimizer.state().into_iter().map(|(name, t)| (format!("optimizer {name}"), t));
    trainer.parameters().into_iter().chain(state).map(|(name, t)| (name, t.detach().copy())).collect()
}

/// The parameters whose names are wanted.
fn named(trainer: &Trainer, is_wanted: impl Fn(&str) -> bool) -> Vec<(String, Tensor)> {
    trainer.parameters().into_iter().filter(|(name, _)| is_wanted(name)).collect()
}

#[track_caller]
fn assert_same(a: &[(String, Tensor)], b: &[(String, Tensor)]) {
    assert_eq!(a.len(), b.len());
    for ((name, a), (other, b)) in a.iter().zip(b) {
        assert_eq!(name, other);
        assert!(a.equal(b), "{name} differs by {}", (a - b).abs().max().double_value(&[]));
    }
}

fn losses(folder: &Path) -> Vec<(u64, f64, Option<f64>, f64)> {
    let lines = MetricsLog::read(&folder.join("metrics.jsonl")).unwrap();
    let step = |line| match line {
        Line::Step(s) => Some((s.step, s.loss_lm, s.loss_distill, s.grad_norm)),
        Line::Eval(_) | Line::Event(_) => None,
    };
    lines.into_iter().filter_map(step).collect()
}

/// Sets a flag after some step, as a signal does.
struct StopAfter(u64, Arc<AtomicBool>);

impl Progress for StopAfter {
    fn begin(&mut self, _: u64, _: u64) {}
    fn step(&mut self, metrics: &StepMetrics) {
        self.1.store(metrics.step == self.0, Ordering::Relaxed);
    }
    fn tokenizer_step(&mut self, _: u64, _: u64, _: f64) {}
    fn evaluating(&mut self, _: usize, _: usize) {}
    fn evaluated(&mut self, _: &EvalMetrics) {}
    fn compared(&mut self, _: &Language) {}
    fn saved(&mut self, _: &Path) {}
}

fn annotations(folder: &Path) -> String {
    for (name, side) in [("a.png", 40), ("b.png", 90)] {
        let picture = vora_image::RgbImage::from_fn(side, 50, |x, y| [(x * 2) as u8, (y * 5) as u8, 90].into());
        picture.save(folder.join(name)).unwrap();
    }
    let record = |frames: &str, question: &str| {
        format!(
            r#"{{"frames": [{frames}], "conversations": [{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "a star"}}]}}"#
        )
    };
    let with = [r#""a.png""#, r#""b.png""#, r#""gone.png""#].map(|frame| record(frame, "<image>\\nWhat is it?"));
    std::fs::write(folder.join("pictures.jsonl"), with.join("\n")).unwrap();
    std::fs::write(folder.join("words.jsonl"), record("", "What is it?")).unwrap();
    let at = |name: &str| folder.join(name).display().to_string();
    format!(
        "data_paths: [{{anno_path: '{}', image_folder: '{}'}}, {{anno_path: '{}', image_folder: ''}}]",
        at("pictures.jsonl"),
        folder.display(),
        at("words.jsonl")
    )
}

/// The other ways to see, by their `model` sections.
const OTHER_SYSTEMS: [&str; 8] = [
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2}",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     mm_projector_type: linear, vision_feature_layer: [-1, 1], lora: {layers: 2, r: 4}}",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     freeze_llm: false}",
    "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, vqmodel: {steps: 3, batch_size: 2, \
     num_embeddings: 32}}",
    "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, z_loss: 0, vqmodel: {steps: 1, batch_size: 1, \
     channel_multiplier: [1, 1, 1]}}",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     vision_lora: {r: 2, lora_alpha: 3}}",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     lora: {layers: 1, r: 4}, vision_lora: {r: 2, layers: 1, target_modules: [attention.query, fc1], \
     rank_pattern: {fc1: 3}}}",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     freeze_llm: false, train: [vision_tower]}",
];
