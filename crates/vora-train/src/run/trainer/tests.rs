use std::path::Path;

use super::*;
use vora_image::ImageProcessor;
use vora_model::VisionLanguageModel;
use vora_torch::safetensors::Checkpoint;

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
    let options =
        Options { device: Device::Cpu, resume, resolve: &resolve, stop: Arc::default(), save: Arc::default() };
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
    fn saved(&mut self, _: &Path) {}
}

/// What a run learns from, what it shows of held-out records, and what is shown of a run that is not there: the same.
#[test]
fn one_preparation_serves_training_samples_and_show() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // A teacher with a processor of its own, which the second stage knows from the first alone.
    std::fs::create_dir(path("teacher")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixtures::root().join("tiny/dinov2").join(file), path("teacher").join(file)).unwrap();
    }
    let own = r#"{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3], "resample": 2}"#;
    std::fs::write(path("teacher/preprocessor_config.json"), own).unwrap();
    let teacher = format!("model.aux_vision={}", path("teacher").display());
    trainer(config("smoke.yaml", &path("first"), &[&teacher, "max_steps=1"])).train(&mut Silent).unwrap();

    let data = fixtures::root().join("tiny/data");
    let files = format!(
        "{{data_fetch: {{data_paths: [{{anno_path: {}, image_folder: {}}}]}}}}",
        data.join("conversations.jsonl").display(),
        data.join("images").display()
    );
    let model = format!(
        "model={{llm: fixtures/tiny/llm, patch_size: 14, image_size: 56, lora: {{layers: 2, r: 4}}, pretrained: {}}}",
        path("first/final").display()
    );
    let [train, held_out] = ["train", "eval.same"].map(|name| format!("data.{name}={files}"));
    let set = [&*model, &train, "data.eval={}", &held_out, "distill={}", "max_steps=1"];
    let second = config("smoke.yaml", &path("second"), &set);
    let mut run = trainer(second.clone());
    run.train(&mut Silent).unwrap();

    let shown = SampleMaker::new(data::preparation(&second, &resolve).unwrap());
    let shown = data::training(&second, &Arc::new(shown)).unwrap();
    let processor = ImageProcessor::open(&path("first/final")).unwrap();
    assert_eq!(processor.mean_std(), ([0.1, 0.2, 0.3], [0.5, 0.4, 0.3]));
    let asked = vora_run::samples::read(&path("second/samples")).unwrap();
    assert_eq!(asked.len(), 4);
    for (index, asked) in (0..4).zip(asked) {
        let trained = run.training.sample(index).unwrap();
        assert_eq!(shown.sample(index).unwrap(), trained);
        assert_eq!(run.held_out[0].source.sample(index).unwrap(), trained);
        let picture = vora_image::open_image(&data.join(format!("images/{index}.png"))).unwrap();
        assert_eq!(trained.images, [processor.preprocess(&picture).unwrap()]);
        let written = vora_image::open_image(&path("second/samples").join(&asked.image)).unwrap();
        assert_eq!(written, samples::seen(&trained.images[0], &processor));
        assert_eq!(format!("<image>\n{}", asked.question), trained.questions[0].question);
    }
}

#[test]
fn a_run_in_f32_leaves_everything() {
    leaves_everything("bf16=false", Kind::Float);
}

#[test]
fn a_run_in_bf16_leaves_everything() {
    leaves_everything("bf16=true", Kind::BFloat16);
}

fn leaves_everything(dtype: &str, kind: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path();
    let mut trainer = trainer(config("smoke.yaml", run, &[dtype]));
    let Outcome::Finished(report) = trainer.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
    assert_eq!(EvalReport::open(&run.join("eval.json")).unwrap(), report);
    for split in ["test", "unseen"] {
        let all = report.all(split).unwrap();
        assert!(all.n >= 8 && all.blind_exact_match.is_some(), "{split}: {all:?}");
    }
    let lines = MetricsLog::read(&run.join("metrics.jsonl")).unwrap();
    let evals = lines.iter().filter(|line| matches!(line, Line::Eval(_))).count();
    assert_eq!((lines.len(), evals), (10, 2)); // at steps 4 and 8
    let Line::Step(first) = &lines[0] else { panic!("the first line is a step") };
    assert!(first.baseline_distill.is_some_and(|b| b > 0.5) && first.memory.is_none_or(|bytes| bytes > 1 << 20));
    let mean = first.distill_blocks.iter().sum::<f64>() / first.distill_blocks.len() as f64;
    assert!(first.distill_blocks.len() == 2 && (mean - first.loss_distill.unwrap()).abs() < 1e-6, "{first:?}");
    assert!(std::fs::read_to_string(run.join("loss.svg")).unwrap().contains("without looking"));
    let again = TrainConfig::open(&run.join("config.yaml"), &[]).unwrap();
    assert_eq!(again, trainer.config);
    let steps: Vec<u64> = checkpoint::list(run).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [4, 8]);

    let questions = std::fs::read_to_string(run.join("samples/questions.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(questions.lines().next().unwrap()).unwrap();
    let picture = vora_image::open_image(&run.join("samples").join(first["image"].as_str().unwrap())).unwrap();
    assert_eq!(picture.dimensions(), (56, 56));
    assert_eq!(questions.lines().count(), 16);

    // What TensorBoard shows of it.
    let scalars = tensorboard::scalars(run).unwrap();
    let steps = |tag: &str| scalars.iter().filter(|s| s.0 == tag).map(|s| s.1).collect::<Vec<_>>();
    for tag in ["train/loss", "distill/block_00", "distill/block_01", "train/grad_norm"] {
        assert_eq!(steps(tag), (1..=8).collect::<Vec<_>>(), "{tag}");
    }
    for tag in ["eval/test/all", "eval/unseen/all/blind"] {
        assert_eq!(steps(tag), [4, 8], "{tag}");
    }
    let pictures = tensorboard::shown(run).unwrap();
    for tag in ["samples/test-0", "samples/unseen-7/answer", "block_maps", "block_maps/cosine"] {
        let steps: Vec<u64> = pictures.iter().filter(|p| p.0 == tag).map(|p| p.1).collect();
        assert_eq!(steps, [4, 8], "{tag}");
    }
    for step in [4, 8] {
        let text = std::fs::read(run.join(format!("block_maps/step-{step}.json"))).unwrap();
        let layout: vora_run::block_maps::Layout = serde_json::from_slice(&text).unwrap();
        assert_eq!(layout.pictures.iter().map(|p| p.cosines.len()).collect::<Vec<_>>(), [2; 4]);
        assert!(layout.pictures[0].cosines.iter().all(|cosine| cosine.abs() <= 1.0));
    }

    // What lies in final/ is the model that was trained, in the dtype it was trained in.
    let model = vora_model::open(&run.join("final"), Device::Cpu, kind, &resolve).unwrap();
    let batch = DeviceBatch::new(&trainer.next_batches().unwrap()[0], Device::Cpu);
    let hidden =
        |model: &dyn VisionLanguageModel| tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state;
    fixtures::assert_close_to(&hidden(&*model), &hidden(&*trainer.student.model), 0.0);
}

/// The other ways to see, by their `model` sections.
const OTHER_SYSTEMS: [&str; 5] = [
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2}",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     mm_projector_type: linear, vision_feature_layer: [-1, 1], lora: {layers: 2, r: 4}}",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     freeze_llm: false}",
    "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, vqmodel: {steps: 3, batch_size: 2, \
     num_embeddings: 32}}",
    "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, z_loss: 0, vqmodel: {steps: 1, batch_size: 1, \
     channel_multiplier: [1, 1, 1]}}",
];

#[test]
fn the_other_systems_are_trained_resumed_and_opened_again() {
    for model in OTHER_SYSTEMS {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = |folder: &Path| config("smoke.yaml", folder, &[model, "bf16=false", "max_steps=5"]);
        let mut uninterrupted = trainer(config(whole.path()));
        let Outcome::Finished(report) = uninterrupted.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
        assert!(report.all("unseen").unwrap().blind_exact_match.is_some());

        let mut first = trainer(config(parts.path()));
        let stop = first.stop.clone();
        assert_eq!(first.train(&mut StopAfter(2, stop)).unwrap(), Outcome::Stopped { step: 2 });
        drop(first);
        let mut second = try_new(config(parts.path()), true).unwrap();
        second.train(&mut Silent).unwrap();
        assert_same(&weights(&uninterrupted), &weights(&second));
        assert_same(uninterrupted.student.made(), second.student.made());
        assert_eq!(losses(whole.path()), losses(parts.path()));

        let opened = vora_model::open(&whole.path().join("final"), Device::Cpu, Kind::Float, &resolve).unwrap();
        let batch = DeviceBatch::new(&uninterrupted.next_batches().unwrap()[0], Device::Cpu);
        let hidden = |model: &dyn VisionLanguageModel| {
            tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state
        };
        fixtures::assert_close_to(&hidden(&*opened), &hidden(&*uninterrupted.student.model), 0.0);
    }
}

#[test]
fn the_second_stage_of_a_llava_starts_from_the_first() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut stage_1 = trainer(config("smoke.yaml", first.path(), &[OTHER_SYSTEMS[0], "max_steps=2"]));
    stage_1.train(&mut Silent).unwrap();
    let from = |folder: &Path| format!("model.pretrained={}", folder.display());
    let settings = [OTHER_SYSTEMS[2], &from(&first.path().join("final"))];
    let stage_2 = trainer(config("smoke.yaml", second.path(), &settings));
    let projector = |trainer: &Trainer| named(trainer, |name| name.starts_with("multi_modal_projector."));
    assert_eq!(projector(&stage_1).len(), 4);
    assert_same(&projector(&stage_1), &projector(&stage_2));
    drop(stage_2);
    let wrong = config("smoke.yaml", second.path(), &[OTHER_SYSTEMS[0], &from(Path::new("nowhere"))]);
    let error = format!("{:#}", try_new(wrong, false).err().unwrap());
    assert!(error.contains("model.pretrained: ") && error.contains("nowhere has no vision.safetensors"), "{error}");
}

const STAGE_2: [&str; 4] =
    ["model.lora=null", "model.freeze_llm=false", "model.reuse_aux_vision_embedding_layers=null", "bf16=false"];

#[test]
fn the_second_stage_of_a_vora_trains_all_weights_of_the_merged_first() {
    let [first, second, other, merged] = [(); 4].map(|()| tempfile::tempdir().unwrap());
    let mut stage_1 = trainer(config("smoke.yaml", first.path(), &["bf16=false", "max_steps=3"]));
    stage_1.train(&mut Silent).unwrap();
    let trained = first.path().join("final");
    let mut model = vora_model::open(&trained, Device::Cpu, Kind::Float, &resolve).unwrap();
    model.merge().unwrap();
    model.save(merged.path()).unwrap();
    vora_model::beside::copy_beside(&trained, merged.path()).unwrap();
    let stage_2 = |run: &Path, from: &Path, more: &[&str]| {
        let from = format!("model.pretrained={}", from.display());
        let settings: Vec<&str> = STAGE_2.into_iter().chain([from.as_str()]).chain(more.iter().copied()).collect();
        config("smoke.yaml", run, &settings)
    };

    // A merged folder and the run it came from are the same start, but for the heads, which only the run has.
    let mut from_run = trainer(stage_2(other.path(), &trained, &[]));
    let from_merged = trainer(stage_2(second.path(), merged.path(), &[]));
    let without_heads = |trainer: &Trainer| named(trainer, |name| !name.starts_with("aux_vision."));
    assert_same(&without_heads(&from_run), &without_heads(&from_merged));
    let heads = |trainer: &Trainer| named(trainer, |name| name.starts_with("aux_vision.aux_layer_0."));
    assert_eq!(heads(&stage_1).len(), 2);
    assert_same(&heads(&stage_1), &heads(&from_run));

    // The first loss is the merged model's.
    let (mut sum, mut num_targets) = (0.0, 0.0);
    for batch in from_run.next_batches().unwrap() {
        let batch = DeviceBatch::new(&batch, Device::Cpu);
        let hidden = tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state;
        let hidden = hidden.flatten(0, 1).index_select(0, &batch.positions);
        let logits = |rows: &Tensor| model.llm().logits(rows);
        let loss = tch::no_grad(|| vora_torch::loss::cross_entropy(&hidden, &batch.targets, i64::MAX, logits));
        sum += loss.double_value(&[]);
        num_targets += batch.targets.size()[0] as f64;
    }
    drop((from_run, from_merged));
    let mut tuned = trainer(stage_2(second.path(), merged.path(), &["max_steps=3"]));
    let start = weights(&tuned);
    let metrics = tuned.train_step().unwrap();
    assert!((metrics.loss_lm - sum / num_targets).abs() < 1e-6, "{} {}", metrics.loss_lm, sum / num_targets);
    assert!(metrics.loss_distill.is_some());
    let stop = tuned.stop.clone();
    assert_eq!(tuned.train(&mut StopAfter(2, stop)).unwrap(), Outcome::Stopped { step: 2 });
    drop(tuned);

    // Gone on with bit for bit, and what lies in final/ is a model that runs by itself.
    let mut resumed = try_new(stage_2(second.path(), merged.path(), &["max_steps=3"]), true).unwrap();
    resumed.train(&mut Silent).unwrap();
    let mut whole = trainer(stage_2(other.path(), merged.path(), &["max_steps=3"]));
    whole.train(&mut Silent).unwrap();
    assert_same(&weights(&whole), &weights(&resumed));
    for ((name, a), (_, b)) in start.iter().zip(&weights(&whole)).filter(|((name, _), _)| name.contains("_proj")) {
        assert!(!a.equal(b), "{name} was not trained");
    }
    let last = second.path().join("final");
    let batch = DeviceBatch::new(&whole.next_batches().unwrap()[0], Device::Cpu);
    let hidden =
        |model: &dyn VisionLanguageModel| tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state;
    let expected = hidden(&*whole.student.model);
    fixtures::assert_close_to(
        &hidden(&*vora_model::open(&last, Device::Cpu, Kind::Float, &resolve).unwrap()),
        &expected,
        0.0,
    );
    let mut opened = vora_model::open(&last, Device::Cpu, Kind::Float, &resolve).unwrap();
    opened.merge().unwrap();
    fixtures::assert_close_to(&hidden(&*opened), &expected, 0.0);
    assert_eq!(vora_model::stored_kind(&last, &resolve).unwrap(), Kind::Float);

    // With the adapters it has, a run goes on where the other ended.
    drop((whole, resumed));
    let from = |folder: &Path, more: &str| {
        let from = format!("model.pretrained={}", folder.display());
        config("smoke.yaml", other.path(), &["bf16=false", &from, more])
    };
    assert_same(&trainer(from(&trained, "max_steps=1")).parameters(), &stage_1.parameters());
    let error = |config: TrainConfig| format!("{:#}", try_new(config, false).err().unwrap());
    let merged_error = error(from(merged.path(), "max_steps=1"));
    assert!(merged_error.contains("model.pretrained: ") && merged_error.contains("is merged"), "{merged_error}");
    let rank_error = error(from(&trained, "model.lora.r=8"));
    assert!(rank_error.contains("r: 4") && rank_error.contains("r: 8"), "{rank_error}");
    let size_error = error(stage_2(other.path(), merged.path(), &["model.patch_size=28"]));
    assert!(size_error.contains("model.patch_size is 28") && size_error.contains("with 14"), "{size_error}");
}

#[test]
fn the_average_is_evaluated_saved_and_goes_on_bit_for_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let with = |folder: &Path| config("smoke.yaml", folder, &["bf16=false", "max_steps=5", "ema_decay=0.6"]);
    let mut uninterrupted = trainer(with(whole.path()));
    uninterrupted.train(&mut Silent).unwrap();
    let mut first = trainer(with(parts.path()));
    let stop = first.stop.clone();
    first.train(&mut StopAfter(2, stop)).unwrap();
    drop(first);
    let mut second = try_new(with(parts.path()), true).unwrap();
    second.train(&mut Silent).unwrap();
    assert_same(&weights(&uninterrupted), &weights(&second));
    let average = |trainer: &Trainer| trainer.ema.as_ref().unwrap().state();
    assert_same(&average(&uninterrupted), &average(&second));

    // final/ has the average, the checkpoint beside it the weights themselves.
    let at = |name: &str| Checkpoint::open(&whole.path().join(name).join("vision.safetensors")).unwrap();
    let (last, checkpoint) = (at("final"), at("checkpoints/step-5"));
    let name = "vision_embedding.patchifier.proj.weight";
    let of = |tensors: &[(String, Tensor)]| tensors.iter().find(|(n, _)| n == name).unwrap().1.copy();
    assert!(last.tensor(name).unwrap().equal(&of(&average(&uninterrupted))));
    assert!(checkpoint.tensor(name).unwrap().equal(&of(&uninterrupted.parameters())));
    assert!(!last.tensor(name).unwrap().equal(&checkpoint.tensor(name).unwrap()));
}

#[test]
fn a_scaled_loss_trains_the_same_and_an_overflow_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let train = |loss_scale: Option<LossScale>, steps: u64| {
        let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
        trainer.loss_scale = loss_scale;
        let norms: Vec<f64> = (0..steps).map(|_| trainer.train_step().unwrap().grad_norm).collect();
        (weights(&trainer), norms, trainer.loss_scale, trainer.loader.position())
    };
    let plain = train(None, 3);
    let scaled = train(Some(LossScale::default()), 3);
    // In f32 a power of two changes no digit.
    assert_same(&plain.0, &scaled.0);
    assert_eq!((&plain.1, scaled.2.unwrap().growth_tracker), (&scaled.1, 3));

    let huge = LossScale { scale: 2f32.powi(126), growth_tracker: 7 };
    let (_, norms, left, position) = train(Some(huge), 1);
    let left = left.unwrap();
    assert!(norms[0].is_finite() && left.scale < huge.scale && left.growth_tracker == 1, "{norms:?} {left:?}");
    let skipped = (huge.scale / left.scale).log2() as u64;
    assert_eq!(position, 4 * (skipped + 1));
}

#[test]
fn teachers_of_other_grids_and_blocks_are_learned_from() {
    let folder = tempfile::tempdir().unwrap();
    let run = |settings: &[&str]| {
        let mut trainer = trainer(config("smoke.yaml", folder.path(), settings));
        let metrics = trainer.train_step().unwrap();
        (metrics.loss_distill.unwrap(), metrics.distill_blocks, trainer.parameters())
    };
    let (loss, blocks, _) = run(&["model.patch_size=7"]);
    assert!(loss.is_finite() && blocks.len() == 2);
    let (_, blocks, parameters) = run(&["distill.blocks={1: 0}", "distill.weight_schedule={type: linear, end: 0}"]);
    let heads: Vec<&str> =
        parameters.iter().map(|(name, _)| name.as_str()).filter(|name| name.starts_with("aux_vision")).collect();
    assert_eq!((blocks.len(), heads), (1, vec!["aux_vision.aux_layer_1.0.weight", "aux_vision.aux_layer_1.1.weight"]));
}

/// Two pictures, two conversations about them, one of words alone and one about a picture that is not there.
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

#[test]
fn annotations_are_learned_from_and_bad_ones_left_out() {
    let (data, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let fetch = annotations(data.path());
    let overrides = [
        format!("data={{train: {{data_fetch: {{{fetch}}}}}, eval: {{same: {{data_fetch: {{{fetch}}}, samples: 9}}}}}}"),
        "max_steps=-1".to_owned(),
        "num_train_epochs=3".to_owned(),
        "per_device_train_batch_size=1".to_owned(),
        "gradient_accumulation_steps=1".to_owned(),
        "distill.mean_over=2".to_owned(),
    ];
    let mut trainer = trainer(config("smoke.yaml", folder.path(), &overrides.each_ref().map(String::as_str)));
    let Outcome::Finished(report) = trainer.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
    // Three times four records are twelve steps; the bad one's places are taken by others.
    let losses = losses(folder.path());
    assert_eq!((losses.len(), trainer.loader.num_skipped()), (12, 4));
    assert!(losses.iter().any(|l| l.2.is_none()) && losses.iter().any(|l| l.2.is_some()), "words have no teacher");
    let turns = report.0["same"]["turn"];
    assert_eq!((turns.n, turns.blind_exact_match.is_some()), (3, true));
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut uninterrupted = trainer(config("debug.yaml", whole.path(), &[]));
    uninterrupted.train(&mut Silent).unwrap();

    let mut first = trainer(config("debug.yaml", parts.path(), &[]));
    let stop = first.stop.clone();
    assert_eq!(first.train(&mut StopAfter(7, stop)).unwrap(), Outcome::Stopped { step: 7 });
    drop(first);
    // Killed at step 12 without a word: what it did after the checkpoint is done again.
    let mut second = try_new(config("debug.yaml", parts.path(), &[]), true).unwrap();
    for _ in 7..12 {
        second.train_step().unwrap();
    }
    drop(second);
    let mut third = try_new(config("debug.yaml", parts.path(), &[]), true).unwrap();
    assert_eq!(third.step(), 7);
    assert!(matches!(third.train(&mut Silent).unwrap(), Outcome::Finished(_)));
    assert_same(&weights(&uninterrupted), &weights(&third));
    assert_eq!(losses(whole.path()), losses(parts.path()));
    // TensorBoard has each step once, and those that were done again from the last time.
    let losses_of = |run: &Path| {
        let mut scalars = tensorboard::scalars(run).unwrap();
        scalars.retain(|scalar| scalar.0.starts_with("train/loss") || scalar.0.starts_with("distill/"));
        scalars
    };
    assert_eq!(losses_of(whole.path()), losses_of(parts.path()));
    assert_eq!(losses_of(whole.path()).len(), 20 * (3 + 3));

    // And once more at its end: nothing is left to train.
    drop(third);
    let mut fourth = try_new(config("debug.yaml", parts.path(), &[]), true).unwrap();
    assert!(matches!(fourth.train(&mut Silent).unwrap(), Outcome::Finished(_)));
    assert_same(&weights(&uninterrupted), &weights(&fourth));
}

/// What an LLM's config says of dropout is used, by the run's seed and the step. All in one test: dropout draws from
/// libtorch's generator, which is the process's, and nothing else here does.
#[test]
fn dropout_is_the_runs_own_and_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let llm = folder.path().join("llm");
    std::fs::create_dir(&llm).unwrap();
    for entry in std::fs::read_dir(fixtures::root().join("tiny/llm")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, llm.join(path.file_name().unwrap())).unwrap();
    }
    let written = std::fs::read(llm.join("config.json")).unwrap();
    let drops = |attention_dropout: f64, dropout: f64| {
        let mut config: serde_json::Value = serde_json::from_slice(&written).unwrap();
        (config["attention_dropout"], config["dropout"]) = (attention_dropout.into(), dropout.into());
        std::fs::write(llm.join("config.json"), config.to_string()).unwrap();
    };
    let llm = format!("model.llm={}", llm.display());
    let chameleon = "model={type: chameleon, llm: x, image_size: 56, vqmodel: {steps: 1, batch_size: 2}}";
    let of = |name: &str, set: &[&str]| {
        let set = [set, &[&llm, "bf16=false", "save_strategy=no"]].concat();
        config("smoke.yaml", &folder.path().join(name), &set)
    };
    let steps =
        |trainer: &mut Trainer, count| (0..count).map(|_| trainer.train_step().unwrap().loss_lm).collect::<Vec<f64>>();
    for (system, set) in [("vora", &[][..]), ("chameleon", &[chameleon])] {
        let run = |name: &str, more: &[&str]| trainer(of(&format!("{system}-{name}"), &[set, more].concat()));
        drops(0.0, 0.0);
        let kept = steps(&mut run("kept", &[]), 1);
        for (attention_dropout, dropout) in [(0.3, 0.0), (0.0, 0.3)] {
            drops(attention_dropout, dropout);
            assert_ne!(steps(&mut run("dropping", &[]), 1), kept, "{system}");
        }
        drops(0.2, 0.1);
        let mut whole = run("whole", &[]);
        let expected = steps(&mut whole, 4);
        assert_eq!(steps(&mut run("anew", &["gradient_checkpointing=true"]), 1), expected[..1]);
        let mut first = run("parts", &[]);
        assert_eq!(steps(&mut first, 2), expected[..2], "{system}: one seed gave two runs");
        first.save(&mut Silent).unwrap();
        drop(first);
        let mut second = try_new(of(&format!("{system}-parts"), set), true).unwrap();
        assert_eq!(steps(&mut second, 2), expected[2..]);
        assert_same(&weights(&whole), &weights(&second));
    }
}

#[test]
fn mixed_streams_in_grouped_batches_go_on_bit_for_bit() {
    let shards = fixtures::root().join("golden/record_files");
    let data = |name: &str| format!("{{anno_path: \"{}\", weight: 1}}", shards.join(name).display());
    let overrides = [
        format!(
            "data={{train: {{scenes: {{}}, scenes_weight: 1, group_by_modality: true, \
             data_fetch: {{data_paths: [{}, {}]}}}}}}",
            data("conversations.parquet"),
            data("shard.tar.gz")
        ),
        "per_device_train_batch_size=3".to_owned(),
        "distill.mean_over=2".to_owned(),
        "max_steps=9".to_owned(),
    ];
    let overrides = overrides.each_ref().map(String::as_str);
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut uninterrupted = trainer(config("smoke.yaml", whole.path(), &overrides));
    uninterrupted.train(&mut Silent).unwrap();
    let mut first = trainer(config("smoke.yaml", parts.path(), &overrides));
    let stop = first.stop.clone();
    assert_eq!(first.train(&mut StopAfter(7, stop)).unwrap(), Outcome::Stopped { step: 7 });
    drop(first);
    let folder = checkpoint::latest(parts.path()).unwrap().unwrap();
    assert!(!TrainerState::open(&folder).unwrap().samples_held.is_empty(), "a sample waits for its batch");
    let mut second = try_new(config("smoke.yaml", parts.path(), &overrides), true).unwrap();
    second.train(&mut Silent).unwrap();
    assert_same(&weights(&uninterrupted), &weights(&second));
    assert_eq!(losses(whole.path()), losses(parts.path()));
}

#[test]
fn the_first_losses_are_those_on_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
    let path = fixtures::root().join("losses/debug_cpu.txt");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut found = String::new();
    let mut worst = 0f64;
    for line in text.lines() {
        let metrics = trainer.train_step().unwrap();
        let losses = [metrics.loss_lm, metrics.loss_distill.unwrap()];
        found += &format!("{} {}\n", losses[0], losses[1]);
        for (found, expected) in losses.iter().zip(line.split(' ')) {
            worst = worst.max((found - expected.parse::<f64>().unwrap()).abs());
        }
    }
    // On one machine they are the same; another processor rounds otherwise.
    assert!(trainer.step() == 20 && worst < 5e-3, "off by {worst}; now they are\n{found}");
}

#[test]
fn nothing_is_reported_to_none() {
    let folder = tempfile::tempdir().unwrap();
    trainer(config("smoke.yaml", folder.path(), &["max_steps=1", "report_to=none"])).train(&mut Silent).unwrap();
    assert!(tensorboard::files(folder.path()).unwrap().is_empty());
}

#[test]
fn micro_batches_make_the_large_batch() {
    let step = |batch: usize, accumulation: usize| {
        let folder = tempfile::tempdir().unwrap();
        let overrides =
            [format!("per_device_train_batch_size={batch}"), format!("gradient_accumulation_steps={accumulation}")];
        let mut trainer = trainer(config("debug.yaml", folder.path(), &overrides.each_ref().map(String::as_str)));
        trainer.train_step().unwrap(); // at a rate of 0, in the warm-up
        (trainer.train_step().unwrap(), weights(&trainer))
    };
    let ((one, a), (four, b)) = (step(4, 1), step(1, 4));
    assert!((one.loss_lm - four.loss_lm).abs() < 1e-5, "{} {}", one.loss_lm, four.loss_lm);
    assert!((one.loss_distill.unwrap() - four.loss_distill.unwrap()).abs() < 1e-5);
    assert!((one.grad_norm / four.grad_norm - 1.0).abs() < 1e-3);
    // The running means are the gradients themselves, before AdamW makes them all of one size.
    for ((name, a), (_, b)) in a.iter().zip(&b).filter(|((name, _), _)| name.ends_with("exp_avg")) {
        let largest = a.abs().max().double_value(&[]).max(1e-6);
        let difference = (a - b).abs().max().double_value(&[]);
        assert!(difference < 1e-3 * largest, "{name}: {difference} of {largest}");
    }
}

#[test]
fn layers_computed_anew_give_the_same_step() {
    for model in ["seed=0", OTHER_SYSTEMS[1], OTHER_SYSTEMS[3]] {
        let step = |checkpointing: &str| {
            let folder = tempfile::tempdir().unwrap();
            let mut trainer = trainer(config("smoke.yaml", folder.path(), &[model, "bf16=false", checkpointing]));
            for (name, tensor) in trainer.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
                let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.01 + 1e-3 * (name.len() % 5) as f64));
            }
            let metrics = trainer.train_step().unwrap();
            let gradients = trainer.parameters().into_iter().map(|(name, tensor)| (name, tensor.grad()));
            (metrics, gradients.collect::<Vec<_>>())
        };
        let (kept, anew) = (step("gradient_checkpointing=false"), step("gradient_checkpointing=true"));
        assert_eq!((kept.0.loss_lm, kept.0.loss_distill), (anew.0.loss_lm, anew.0.loss_distill), "{model}");
        let largest = kept.1.iter().map(|(_, g)| g.abs().max().double_value(&[])).fold(0.0, f64::max);
        for ((name, kept), (_, anew)) in kept.1.iter().zip(&anew.1) {
            assert!(kept.defined() && anew.defined(), "{model}: no gradient reaches {name}");
            let difference = (kept - anew).abs().max().double_value(&[]);
            assert!(difference <= 1e-6 * largest, "{model}: {name} differs by {difference} of {largest}");
        }
    }
}

#[test]
fn it_learns() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(config("debug.yaml", folder.path(), &["max_steps=40"]));
    let metrics: Vec<StepMetrics> = (0..40).map(|_| trainer.train_step().unwrap()).collect();
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    let lm = |steps: &[StepMetrics]| mean(steps.iter().map(|m| m.loss_lm).collect());
    let distill = |steps: &[StepMetrics]| mean(steps.iter().filter_map(|m| m.loss_distill).collect());
    let (first, last) = (&metrics[..5], &metrics[35..]);
    assert!(lm(last) < 0.9 * lm(first), "{} -> {}", lm(first), lm(last));
    assert!(distill(last) < distill(first) - 0.02, "{} -> {}", distill(first), distill(last));
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_a_run_of_them_stops() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
    trainer.train_step().unwrap();
    let (_, b) = trainer.parameters().into_iter().find(|(name, _)| name.contains("lora_B")).unwrap();
    let whole = b.detach().copy();
    let fill = |value: &Tensor| tch::no_grad(|| b.shallow_clone().copy_(value));
    fill(&whole.full_like(f64::NAN));
    let before = weights(&trainer);
    let skipped = trainer.train_step().unwrap();
    assert!(skipped.loss.is_nan() && (skipped.step, skipped.skipped_steps) == (2, 1), "{skipped:?}");
    for ((name, before), (_, after)) in before.iter().zip(&weights(&trainer)) {
        assert!(before.allclose(after, 0.0, 0.0, true), "{name} was touched");
    }

    // The schedule waits, the data goes on, and one good step ends the run of bad ones.
    fill(&whole);
    let rate = trainer.config.learning_rate * trainer.schedule.factor(1);
    let taken = trainer.train_step().unwrap();
    assert!(taken.loss.is_finite() && (taken.step, taken.skipped_steps, taken.lr) == (3, 1, rate), "{taken:?}");
    assert_eq!(trainer.loader.position(), 12);
    trainer.save(&mut Silent).unwrap();
    drop(trainer);

    let mut trainer = try_new(config("debug.yaml", folder.path(), &[]), true).unwrap();
    assert_eq!((trainer.step, trainer.skipped_steps, trainer.skipped_in_a_row), (3, 1, 0));
    let (_, b) = trainer.parameters().into_iter().find(|(name, _)| name.contains("lora_B")).unwrap();
    let _ = tch::no_grad(|| b.shallow_clone().fill_(f64::NAN));
    trainer.train_step().unwrap();
    trainer.train_step().unwrap();
    let error = trainer.train_step().unwrap_err();
    let refused = error.downcast_ref::<NotFinite>().unwrap();
    assert_eq!((refused.step, refused.samples.len()), (6, 4));
    let error = format!("{error:#}");
    assert!(error.contains("3 steps in a row") && error.contains("step 6") && error.contains("train-20"), "{error}");

    let lines = MetricsLog::read(&folder.path().join("metrics.jsonl")).unwrap();
    let told = lines.iter().filter_map(|line| if let Line::Event(event) = line { Some(event) } else { None });
    let told: Vec<_> = told.map(|e| (e.step, e.event, e.samples.len())).collect();
    assert_eq!(told, [2, 4, 5, 6].map(|step| (step, EventKind::SkippedStep, 4)));
}

#[test]
fn a_spike_is_logged_with_its_batch() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(config("debug.yaml", folder.path(), &[]));
    for i in 0..128 {
        trainer.spikes.observe(0.01 * f64::from(i % 7));
    }
    trainer.train_step().unwrap();
    let lines = MetricsLog::read(&folder.path().join("metrics.jsonl")).unwrap();
    let Line::Event(event) = &lines[0] else { panic!("the first line is the event: {lines:?}") };
    assert_eq!((event.step, event.event, event.samples.len()), (1, EventKind::LossSpike, 4));
    assert!(matches!(lines[1], Line::Step(_)));
}

#[test]
fn the_best_checkpoint_is_kept_and_becomes_the_final_model() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        "metric_for_best_model=eval_test_exact_match",
        "load_best_model_at_end=true",
        "eval_steps=2",
        "save_steps=2",
        "save_total_limit=1",
        "report_to=none",
    ];
    let mut trainer = trainer(config("smoke.yaml", folder.path(), &settings));
    while trainer.step < 2 {
        trainer.train_step().unwrap();
    }
    trainer.save(&mut Silent).unwrap();
    let at_2: Vec<_> = trainer.parameters().into_iter().map(|(name, t)| (name, t.detach().copy())).collect();
    // As if the evaluation had found all right there: nothing can be better.
    trainer.best = Best::better(None, 2, 1.0, true);
    trainer.train(&mut Silent).unwrap();
    let steps: Vec<u64> = checkpoint::list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [2, 8]);
    assert_same(&at_2, &trainer.parameters());
    let read = |path: &str| std::fs::read(folder.path().join(path).join("vision.safetensors")).unwrap();
    assert!(read("final") == read("checkpoints/step-2") && read("final") != read("checkpoints/step-8"));
    drop(trainer);
    let resumed = try_new(config("smoke.yaml", folder.path(), &settings), true).unwrap();
    assert_eq!((resumed.step, resumed.best), (8, Some(Best { step: 2, metric: 1.0 })));
}

#[test]
fn a_checkpoint_of_one_kind_goes_on_in_another() {
    for (first, second) in [("bf16=true", "bf16=false"), ("bf16=false", "bf16=true")] {
        let folder = tempfile::tempdir().unwrap();
        let mut before = trainer(config("debug.yaml", folder.path(), &[first]));
        for _ in 0..3 {
            before.train_step().unwrap();
        }
        before.save(&mut Silent).unwrap();
        let saved = weights(&before);
        drop(before);
        let mut after = try_new(config("debug.yaml", folder.path(), &[second]), true).unwrap();
        assert_same(&saved, &weights(&after));
        assert!(after.train_step().unwrap().loss.is_finite());
    }
}

#[test]
fn another_rank_is_refused_with_both_values() {
    let folder = tempfile::tempdir().unwrap();
    trainer(config("smoke.yaml", folder.path(), &["max_steps=1"])).train(&mut Silent).unwrap();
    let changed = config("smoke.yaml", folder.path(), &["model.lora.r=8", "model.lora.layers=3", "max_steps=2"]);
    let error = format!("{:#}", try_new(changed, true).err().unwrap());
    assert!(error.contains("cannot resume from") && error.contains("step-1"), "{error}");
    assert!(error.contains("model.lora.layers was 2, is 3; model.lora.r was 4, is 8"), "{error}");
    // Other settings may change.
    let changed = config("smoke.yaml", folder.path(), &["max_steps=2", "learning_rate=1e-4"]);
    assert_eq!(try_new(changed, true).unwrap().step(), 1);
}

#[test]
fn a_run_is_not_written_over_by_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let overrides = ["max_steps=1", "overwrite_output_dir=false"];
    let first = config("smoke.yaml", folder.path(), &overrides);
    let mut first = trainer(first);
    let error = try_new(config("smoke.yaml", folder.path(), &overrides), false).err().unwrap().to_string();
    assert!(error.contains("in use by another trainer"), "{error}");
    first.train(&mut Silent).unwrap();
    drop(first);
    let error = try_new(config("smoke.yaml", folder.path(), &overrides), false).err().unwrap().to_string();
    assert!(error.contains("already holds a run of 1 steps; go on with --resume"), "{error}");
    // A new run that does not open leaves the old one whole; one that opens clears it, and keeps what is not a run's.
    std::fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let files =
        || ["metrics.jsonl", "config.yaml", "loss.svg"].map(|name| std::fs::read(folder.path().join(name)).ok());
    let before = files();
    for wrong in ["model.llm=fixtures/nowhere", "model.lora.layers=5"] {
        try_new(config("smoke.yaml", folder.path(), &["max_steps=1", wrong]), false).err().unwrap();
        assert_eq!(checkpoint::list(folder.path()).unwrap().len(), 1, "{wrong}");
        assert!(files() == before && folder.path().join("final/config.json").exists(), "{wrong}");
    }
    let over = config("smoke.yaml", folder.path(), &["max_steps=1"]);
    assert_eq!(trainer(over).step(), 0);
    assert!(checkpoint::list(folder.path()).unwrap().is_empty());
    for gone in ["final", "samples", "block_maps", "eval.json", "train_results.json", "loss.svg"] {
        assert!(!folder.path().join(gone).exists(), "{gone}");
    }
    assert!(folder.path().join("notes.txt").exists());
}

#[test]
fn a_damaged_model_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    trainer(config("smoke.yaml", folder.path(), &["max_steps=1"])).train(&mut Silent).unwrap();
    for name in ["checkpoints/step-1", "final"] {
        let last = folder.path().join(name);
        let open = || vora_model::open(&last, Device::Cpu, Kind::Float, &resolve).map(drop);
        open().unwrap();
        let file = last.join("vision.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let error = format!("{:#}", open().unwrap_err());
        assert!(error.contains("checksum mismatch") && error.contains("vision.safetensors"), "{error}");
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    trainer(config("smoke.yaml", folder.path(), &[])).train(&mut Silent).unwrap();
    let file = folder.path().join("checkpoints/step-8/optimizer.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(try_new(config("smoke.yaml", folder.path(), &[]), true).unwrap().step(), 4);
}

#[test]
fn what_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |overrides: &[&str], texts: &[&str]| {
        let error = format!("{:#}", try_new(config("smoke.yaml", folder.path(), overrides), false).err().unwrap());
        for text in texts {
            assert!(error.contains(text), "`{error}` lacks `{text}`");
        }
    };
    fails(&["model.llm=fixtures/nowhere"], &["fixtures/nowhere", "config.json"]);
    fails(&["model.aux_vision=fixtures/tiny/llm"], &["model.aux_vision", "`llama` is not a vision encoder known here"]);
    fails(&["model.lora.layers=5"], &["model.lora.layers is 5", "has 4 layers"]);
    fails(
        &["model.image_size=49", "model.patch_size=7", "data.train.scenes.image_size=49"],
        &["a multiple of the teacher's patch size, 14"],
    );
    fails(&["distill.blocks={4: 0}"], &["distill.blocks has the LLM's block 4, it has 4 from 0 on"]);
    fails(&["distill.blocks={0: 9}"], &["distill.blocks gives block 0 the teacher's 9"]);
    fails(&["fp16=true", "bf16=false"], &["fp16", "needs a GPU"]);
    fails(&["model.vision_embedding_intermediate_size=32"], &["32 channels", "teacher of 24"]);
    fails(&["learning_rates={lora_C: 1}"], &["learning_rates.lora_C"]);
    fails(&["model.pretrained=x"], &["model.pretrained", "x/config.json"]);
}
