//! Several samples in a row teach what they teach in rows of their own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use vora_data::scenes::{Scenes, ScenesConfig, Split};
use vora_data::{Batch, Record, RecordKeys, Sample, SampleMaker, collate, collate_sharing, pack};
use vora_llm::DropoutSeed;
use vora_recipe::TrainConfig;
use vora_run::metrics::{Line, MetricsLog, StepMetrics};
use vora_student::{DeviceBatch, Losses, Student};
use vora_train::{Options, Trainer};

/// The ways to see, by their `model` sections.
const SYSTEMS: [&str; 4] = [
    "model.lora.r=4",
    "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2, \
     freeze_llm: false}",
    "model={type: chameleon, llm: fixtures/tiny/llm, image_size: 56, vqmodel: {steps: 1, batch_size: 2}}",
    "model.max_image_tokens=12",
];

fn resolve(name: &str) -> Result<PathBuf> {
    Ok(fixtures::root().parent().context("the workspace")?.join(name))
}

fn config(overrides: &[&str]) -> TrainConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/smoke.yaml");
    let overrides: Vec<String> = ["bf16=false"].iter().chain(overrides).map(|&entry| entry.to_owned()).collect();
    TrainConfig::open(&path, &overrides).unwrap()
}

/// Scenes of several shapes with branches, conversations about a picture and about two of them, and text alone.
fn samples(maker: &SampleMaker) -> Vec<Sample> {
    let shapes = ScenesConfig { aspects: Some([0.4, 2.5]), sides: Some([20, 80]), ..ScenesConfig::default() };
    let scenes = Scenes::new(shapes, Split::Train).unwrap();
    let scene = |index| maker.packed(format!("scene-{index}"), &scenes.render(index), scenes.questions(index)).unwrap();
    let talk = |index: u64, question: &str, answer: &str| {
        let frames: Vec<u64> = (0..question.matches("<image>").count() as u64).map(|n| index + n).collect();
        let turns = [("human", question), ("gpt", answer), ("human", "Sure?"), ("gpt", "yes")];
        let turns = turns.map(|(from, value)| serde_json::json!({"from": from, "value": value}));
        let frame_names: Vec<_> = frames.iter().map(|frame| format!("{frame}.png")).collect();
        let json = serde_json::json!({"id": format!("talk-{index}"), "frames": frame_names, "conversations": turns});
        let record = Record::parse(json.to_string().as_bytes(), &RecordKeys::default()).unwrap();
        let images: Vec<_> = frames.iter().map(|&frame| scenes.render(frame)).collect();
        maker.conversation(&record, &images).unwrap()
    };
    vec![
        scene(0),
        talk(1, "<image>\nWhat is it?", "a star"),
        talk(2, "How many are one and two?", "three"),
        scene(3),
        talk(4, "<image>\n<image>\nWhich is red?", "the second"),
        talk(5, "Say no", "no"),
        scene(6),
        scene(7),
    ]
}

/// Both losses and the gradient of their sum.
fn learned(config: &TrainConfig, batch: &Batch) -> (f64, Option<f64>, Vec<(String, Tensor)>) {
    let student = Student::new(config, Device::Cpu, Kind::Float, &resolve).unwrap();
    let uploaded = DeviceBatch::new(batch, Device::Cpu);
    let (mut lm, mut distill) = (0.0, None);
    let total = |losses: Losses| {
        let mean = losses.lm_sum / student.num_targets(&uploaded) as f64;
        lm = mean.double_value(&[]);
        distill = losses.distill.as_ref().map(|distill| distill.double_value(&[]));
        losses.distill.map_or_else(|| mean.shallow_clone(), |distill| &mean + distill)
    };
    student.backward(&uploaded, DropoutSeed::new(0), total).unwrap();
    let gradients = student.parameters().into_iter().map(|(name, parameter)| (name, parameter.grad()));
    let gradients = gradients.filter(|(_, gradient)| gradient.defined()).collect();
    (lm, distill, gradients)
}

#[test]
fn packed_rows_have_the_loss_and_the_gradient_of_rows_with_one_sample() {
    for system in SYSTEMS {
        let config = config(&[system, "bf16=false"]);
        let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
        let samples = samples(&SampleMaker::new(student.preparation(&config).unwrap()));
        // Without the student's weights they are the same.
        let preparation = vora_student::preparation(&config, &resolve).unwrap();
        assert_eq!(self::samples(&SampleMaker::new(preparation)), samples);
        let longest = samples.iter().map(|sample| sample.input_ids.len()).max().unwrap();
        let packed = pack(samples.clone(), 4, 2 * longest, 0);
        let alone = collate(samples, 0);
        let [packed] = packed.as_slice() else { panic!("one batch of {}", packed.len()) };
        assert!(packed.batch < alone.batch && packed.batch * packed.seq < alone.batch * alone.seq);

        let (lm, distill, gradients) = learned(&config, &alone);
        let (packed_lm, packed_distill, packed_gradients) = learned(&config, packed);
        assert!((lm - packed_lm).abs() < 1e-5, "{system}: {lm} {packed_lm}");
        assert_eq!(distill.is_some(), config.model.aux_vision.is_some());
        let apart = distill.zip(packed_distill).map_or(0.0, |(a, b)| (a - b).abs());
        assert!(apart < 1e-5, "{system}: {distill:?} {packed_distill:?}");
        assert!(gradients.len() == packed_gradients.len() && !gradients.is_empty());
        for ((name, a), (other, b)) in gradients.iter().zip(&packed_gradients) {
            let largest = a.abs().max().double_value(&[]);
            let apart = (a - b).abs().max().double_value(&[]);
            assert!(name == other && apart < 1e-5 * largest.max(1.0), "{system}, {name}: {apart} of {largest}");
        }
    }
}

/// What all samples begin with, computed once in one row for all of them, gives the losses and the gradient of rows that
/// each compute it.
#[test]
fn a_shared_start_has_the_loss_and_the_gradient_of_every_samples_own() {
    for system in [SYSTEMS[0], SYSTEMS[1], SYSTEMS[3]] {
        let config = config(&[system, "bf16=false"]);
        let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
        let mut samples = samples(&SampleMaker::new(student.preparation(&config).unwrap()));
        samples.retain(|sample| !sample.images.is_empty());
        let (sharing, alone) = (collate_sharing(samples.clone(), 0), collate(samples, 0));
        let shared = sharing.spans.rows()[0][0];
        assert!(sharing.batch == 1 && shared.document().is_none() && shared.len() > 1, "{shared:?}");
        assert_eq!(sharing.seq, alone.spans.num_tokens() - (alone.batch - 1) * shared.len());

        let (lm, distill, gradients) = learned(&config, &alone);
        let (shared_lm, shared_distill, shared_gradients) = learned(&config, &sharing);
        assert!((lm - shared_lm).abs() < 1e-5, "{system}: {lm} {shared_lm}");
        assert_eq!(distill.is_some(), config.model.aux_vision.is_some());
        let apart = distill.zip(shared_distill).map_or(0.0, |(a, b)| (a - b).abs());
        assert!(apart < 1e-5, "{system}: {distill:?} {shared_distill:?}");
        for ((name, a), (other, b)) in gradients.iter().zip(&shared_gradients) {
            let largest = a.abs().max().double_value(&[]);
            let apart = (a - b).abs().max().double_value(&[]);
            assert!(name == other && apart < 1e-5 * largest.max(1.0), "{system}, {name}: {apart} of {largest}");
        }
    }
}

/// A Chameleon's pictures are encoded once a step, and what is read there is what is learned to be written.
#[test]
fn a_chameleon_reads_and_writes_the_tokens_of_its_pictures() {
    let config = config(&[&SYSTEMS[2].replace("image_size: 56", "image_size: 56, z_loss: 0")]);
    let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
    let batch = collate(samples(&SampleMaker::new(student.preparation(&config).unwrap())), 0);
    let batch = DeviceBatch::new(&batch, Device::Cpu);
    let mut found = 0.0;
    let total = |losses: Losses| {
        found = losses.lm_sum.double_value(&[]);
        losses.lm_sum
    };
    student.backward(&batch, DropoutSeed::new(0), total).unwrap();

    let writer = student.model.image_writer().unwrap();
    let one_by_one = batch.input.pixel_values.chunks(1).map(|picture| writer.image_tokens(picture).unwrap());
    let tokens = Tensor::cat(&one_by_one.collect::<Vec<_>>(), 0);
    let places = Tensor::cat(&[&batch.positions, &(&batch.image_places - 1)], 0);
    let targets = Tensor::cat(&[&batch.targets, &tokens], 0);
    let output = tch::no_grad(|| student.model.forward(&batch.input, 0)).unwrap();
    let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &places);
    let log_probs = student.model.llm().logits(&hidden).to_kind(Kind::Float).log_softmax(-1, Kind::Float);
    let expected = -log_probs.gather(1, &targets.unsqueeze(1), false).sum(Kind::Float);
    assert_eq!(targets.size()[0], student.num_targets(&batch));
    let expected = expected.double_value(&[]);
    assert!((found / expected - 1.0).abs() < 1e-5, "{found}, expected {expected}");
}

fn trainer(folder: &Path, packing: bool, resume: bool) -> Trainer {
    let output_dir = format!("output_dir={}", folder.display());
    let packing = format!("data.train.packing={packing}");
    let preprocess = "data.train.data_preprocess={max_seq_len: 230}";
    let config = config(&[&output_dir, &packing, preprocess, "bf16=false", "save_steps=100"]);
    let mut options = Options::new(Device::Cpu, &resolve);
    options.resume = resume;
    Trainer::new(config, options).unwrap()
}

fn steps(trainer: &mut Trainer, count: usize) -> Vec<(f64, Option<f64>, f64)> {
    let step = |metrics: StepMetrics| (metrics.loss_lm, metrics.loss_distill, metrics.padding_share);
    (0..count).map(|_| step(trainer.train_step().unwrap())).collect()
}

#[test]
fn a_packed_run_goes_on_where_it_stopped() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = steps(&mut trainer(whole.path(), true, false), 6);
    let mut first = trainer(parts.path(), true, false);
    assert_eq!(steps(&mut first, 3), expected[..3]);
    first.save(&mut vora_train::Silent).unwrap();
    drop(first);
    assert_eq!(steps(&mut trainer(parts.path(), true, true), 3), expected[3..]);

    // The log has the share of padding.
    let lines = MetricsLog::read(&parts.path().join("metrics.jsonl")).unwrap();
    let logged = lines.iter().map(|line| match line {
        Line::Step(metrics) => metrics.padding_share,
        Line::Eval(_) | Line::Event(_) => panic!("nothing but steps was logged"),
    });
    let logged: Vec<f64> = logged.collect();
    assert_eq!(logged.len(), expected.len());
    assert!(logged.iter().zip(&expected).all(|(share, step)| (share - step.2).abs() < 1e-12), "{logged:?}");
    assert!(expected.iter().all(|step| (0.0..0.5).contains(&step.2)), "{expected:?}");
}

#[test]
fn what_is_not_finite_is_found_in_a_packed_row() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(folder.path(), true, false);
    trainer.train_step().unwrap();
    let (_, b) = trainer.parameters().into_iter().find(|(name, _)| name.contains("lora_B")).unwrap();
    let _ = tch::no_grad(|| b.shallow_clone().fill_(f64::NAN));
    let error = (0..10).find_map(|_| trainer.train_step().err()).expect("a run of such steps stops");
    let refused = error.downcast_ref::<vora_train::NotFinite>().unwrap();
    // More samples than the four rows of a step.
    assert!(refused.samples.len() > 4, "{error}");
}

#[test]
fn a_packed_run_must_say_its_steps() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/smoke.yaml");
    let data = "data={train: {packing: true, data_fetch: {data_paths: [{anno_path: a.jsonl}]}}}";
    let open =
        |overrides: &[&str]| TrainConfig::open(&path, &overrides.iter().map(|s| s.to_string()).collect::<Vec<_>>());
    assert_eq!(open(&[data]).unwrap().packed_row_len(), Some(2048));
    let error = format!("{:#}", open(&[data, "max_steps=-1"]).unwrap_err());
    assert!(error.contains("max_steps is -1, but with data.train.packing"), "{error}");
}

#[test]
fn what_is_cut_or_left_out_for_its_length_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let record = |question: &str, turns: usize| {
        let turns = ["human", "gpt"].iter().cycle().take(2 * turns);
        let turns: Vec<_> = turns.map(|from| serde_json::json!({"from": from, "value": question})).collect();
        serde_json::json!({"conversations": turns}).to_string()
    };
    let path = folder.path().join("words.jsonl");
    std::fs::write(&path, [record("yes", 1), record("no", 9), record(&"no ".repeat(60), 1)].join("\n")).unwrap();
    let data = format!(
        "data={{train: {{data_preprocess: {{max_seq_len: 60}}, data_fetch: {{data_paths: [{{anno_path: {}}}]}}}}}}",
        path.display()
    );
    let output_dir = format!("output_dir={}", folder.path().join("run").display());
    let overrides = [&output_dir, &data, "distill.center=false", "per_device_train_batch_size=1"];
    let config = config(&[&overrides[..], &["gradient_accumulation_steps=2", "shuffle=false"]].concat());
    let options = Options::new(Device::Cpu, &resolve);
    let mut trainer = Trainer::new(config, options).unwrap();
    let counts: Vec<_> = (0..2).map(|_| trainer.train_step().unwrap()).map(|m| (m.truncated, m.too_long)).collect();
    assert_eq!(counts, [(1, 0), (1, 1)]);
}

#[test]
fn a_template_with_a_token_beyond_the_embedding_is_refused_before_the_run() {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(resolve("fixtures/tiny/llm").unwrap()).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"vocab_size\": 512"));
    std::fs::write(path, text.replace("\"vocab_size\": 512", r#""vocab_size": 1"#)).unwrap();
    let config = config(&[&format!("model.llm={}", folder.path().display())]);
    let error = format!("{:#}", vora_student::preparation(&config, &resolve).unwrap_err());
    assert!(error.starts_with("the chat template: token `<|im_"), "{error}");
    assert!(error.contains("the model's embedding has 1 rows, the tokenizer 512 tokens"), "{error}");
}
