//! Runs whose pictures keep their own shape.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use tch::{Device, Kind};
use vora_data::SampleMaker;
use vora_image::{Aspect, ImageProcessor, RgbImage, TokenBudget};
use vora_recipe::TrainConfig;
use vora_run::eval::EvalReport;
use vora_run::language::Language;
use vora_run::metrics::{EvalMetrics, Line, MetricsLog, StepMetrics};
use vora_student::Student;
use vora_train::{Options, Outcome, Progress, Silent, Trainer, data};

const SHAPED: [&str; 4] = [
    "model.max_image_tokens=12",
    "model.min_image_tokens=3",
    "data.train.scenes={aspects: [0.33, 3], sides: [20, 120], lone_first: 8}",
    "data.eval={test: {split: test, samples: 4}, shaped: {split: shaped, samples: 4, sides: [28, 448]}}",
];

fn resolve(name: &str) -> Result<PathBuf> {
    Ok(fixtures::root().parent().context("the workspace")?.join(name))
}

fn config(folder: &Path, overrides: &[&str]) -> TrainConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/smoke.yaml");
    let output_dir = format!("output_dir={}", folder.display());
    let all = [&*output_dir, "bf16=false"].into_iter().chain(overrides.iter().copied()).map(str::to_owned);
    TrainConfig::open(&path, &all.collect::<Vec<_>>()).unwrap()
}

fn trainer(folder: &Path, resume: bool, stop: &Arc<AtomicBool>) -> Trainer {
    let mut options = Options::new(Device::Cpu, &resolve);
    (options.resume, options.stop) = (resume, stop.clone());
    Trainer::new(config(folder, &SHAPED), options).unwrap()
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

fn losses(folder: &Path) -> Vec<(u64, f64, Option<f64>, f64)> {
    let step = |line| match line {
        Line::Step(s) => Some((s.step, s.loss_lm, s.loss_distill, s.grad_norm)),
        Line::Eval(_) | Line::Event(_) => None,
    };
    MetricsLog::read(&folder.join("metrics.jsonl")).unwrap().into_iter().filter_map(step).collect()
}

#[test]
fn pictures_of_many_shapes_are_learned_from_and_a_run_on_them_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(name));
    let config = config(&whole, &SHAPED);
    let maker = Arc::new(SampleMaker::new(vora_student::preparation(&config, &resolve).unwrap()));
    let training = data::training(&config, &maker).unwrap();
    let grids: BTreeSet<(usize, usize)> = (0..16)
        .flat_map(|index| training.sample(index).unwrap().images)
        .map(|picture| (picture.height / 14, picture.width / 14))
        .collect();
    assert!(grids.iter().all(|(rows, columns)| (3..=12).contains(&(rows * columns))), "{grids:?}");
    assert!(grids.iter().any(|(r, c)| r > c) && grids.iter().any(|(r, c)| c > r) && grids.len() > 5, "{grids:?}");

    let stop = Arc::new(AtomicBool::new(false));
    let Outcome::Finished(report) = trainer(&whole, false, &stop).train(&mut Silent).unwrap() else {
        panic!("stopped")
    };
    assert_eq!(EvalReport::open(&whole.join("eval.json")).unwrap(), report);
    for split in ["shaped", "test"] {
        assert!(report.all(split).unwrap().blind_exact_match.is_some(), "{split}");
    }
    let found = losses(&whole);
    assert!(found.iter().all(|(_, lm, distill, _)| lm.is_finite() && distill.is_some_and(f64::is_finite)), "{found:?}");
    let budget = TokenBudget::new(14, 3, 12).unwrap();
    assert_eq!(ImageProcessor::open(&whole.join("final")).unwrap().aspect(), Aspect::Keep(budget));

    let outcome = trainer(&cut, false, &stop).train(&mut StopAfter(3, stop.clone())).unwrap();
    assert_eq!(outcome, Outcome::Stopped { step: 3 });
    stop.store(false, Ordering::Relaxed);
    trainer(&cut, true, &stop).train(&mut Silent).unwrap();
    assert_eq!(losses(&cut), found);
    let adapter = |run: &Path| std::fs::read(run.join("final/adapter_model.safetensors")).unwrap();
    assert!(adapter(&whole) == adapter(&cut), "other weights");
    goes_on_from(&whole.join("final"));
}

/// What was trained before keeps its budget, and takes another one.
fn goes_on_from(trained: &Path) {
    let from = format!("model.pretrained={}", trained.display());
    let aspect = |more: &[&str]| {
        let config = config(trained, &[&[from.as_str()], more].concat());
        vora_student::preparation(&config, &resolve).unwrap().processor.aspect()
    };
    assert_eq!(aspect(&[]), Aspect::Keep(TokenBudget::new(14, 3, 12).unwrap()));
    assert_eq!(aspect(&["model.max_image_tokens=16"]), Aspect::Keep(TokenBudget::new(14, 1, 16).unwrap()));
    assert_eq!(aspect(&["model.image_aspect_ratio=squash"]), Aspect::Squash);
}

#[test]
fn training_and_asking_see_the_same_shape_and_refuse_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), &["model.max_image_tokens=9", "model.min_image_tokens=4"]);
    let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
    let shown = vora_student::preparation(&config, &resolve).unwrap().processor;
    for (width, height, columns, rows) in [(150, 60, 4, 1), (60, 150, 1, 4), (30, 27, 2, 2), (9, 9, 2, 2)] {
        let picture = RgbImage::from_fn(width, height, |x, y| [x as u8, y as u8, 90].into());
        let pixels = shown.preprocess(&picture).unwrap();
        assert_eq!((pixels.width, pixels.height), (14 * columns, 14 * rows), "{width} x {height}");
        assert_eq!(student.pictures().processor.preprocess(&picture).unwrap(), pixels);
        let grid = student.model.image_grid(pixels.height as i64, pixels.width as i64).unwrap();
        assert_eq!(grid, (rows as i64, columns as i64));
    }
    let error = format!("{:#}", shown.preprocess(&RgbImage::new(200, 10)).unwrap_err());
    assert!(error.contains("a picture of 200 x 10 pixels cannot keep its shape within 9 tokens"), "{error}");
}

#[test]
fn a_shape_that_teacher_or_positions_do_not_know_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = |more: &str| {
        let config = config(folder.path(), &["model.max_image_tokens=9", more]);
        format!("{:#}", Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap_err())
    };
    assert!(error("model.pos_embed=first_rows").contains("model.pos_embed is first_rows, which knows no shape"));
    assert!(error("model.patch_size=7").contains("model.patch_size is 7, where pictures keep their shape"));
}
