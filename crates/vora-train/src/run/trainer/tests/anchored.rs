//! Runs with a text anchor.

use super::*;
use crate::anchor::Held;
use vora_llm::{AttentionPlan, VisionAttention};
use vora_lora::ActsOn;
use vora_text::Spans;

const ANCHOR: &str = "text_anchor={texts: 5, tokens: 24, max_length: 12, weight: 0.5}";

/// The anchor's loss in each line of the log.
fn anchored(folder: &Path) -> Vec<Option<f64>> {
    let lines = MetricsLog::read(&folder.join("metrics.jsonl")).unwrap();
    let step = |line| match line {
        Line::Step(s) => Some(s.loss_anchor),
        Line::Eval(_) | Line::Event(_) => None,
    };
    lines.into_iter().filter_map(step).collect()
}

#[test]
fn an_anchored_run_goes_on_bit_for_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let with = |folder: &Path| config("debug.yaml", folder, &[ANCHOR, "max_steps=8"]);
    let mut uninterrupted = trainer(with(whole.path()));
    uninterrupted.train(&mut Silent).unwrap();
    let mut first = trainer(with(parts.path()));
    let stop = first.stop.clone();
    assert_eq!(first.train(&mut StopAfter(3, stop)).unwrap(), Outcome::Stopped { step: 3 });
    drop(first);
    let texts = std::fs::read(parts.path().join("text_anchor.json")).unwrap();
    assert_eq!(texts, std::fs::read(whole.path().join("text_anchor.json")).unwrap());
    let mut second = try_new(with(parts.path()), true).unwrap();
    second.train(&mut Silent).unwrap();
    assert_same(&weights(&uninterrupted), &weights(&second));
    let found = anchored(whole.path());
    assert_eq!(found, anchored(parts.path()));
    // B is zero at first: nothing is forgotten yet.
    let values: Vec<f64> = found.into_iter().flatten().collect();
    assert_eq!(values.len(), 8);
    assert!(values[0].abs() < 1e-6 && values[4..].iter().all(|value| *value > 1e-5), "{values:?}");
    assert!(tensorboard::scalars(whole.path()).unwrap().iter().any(|scalar| scalar.0 == "train/loss_anchor"));

    // Without the file nothing tells what was learned from.
    drop(second);
    std::fs::remove_file(parts.path().join("text_anchor.json")).unwrap();
    let error = format!("{:#}", try_new(with(parts.path()), true).err().unwrap());
    assert!(error.contains("cannot read") && error.contains("text_anchor.json"), "{error}");
}

/// The gradient of a step with the anchor is that of one without, and that of the divergence by its definition.
#[test]
fn the_anchor_adds_its_own_gradient_once_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let mut runs = 0;
    let mut fresh = |overrides: &[&str]| {
        runs += 1;
        let common = ["max_grad_norm=0", "max_steps=3"];
        let mut trainer =
            trainer(config("debug.yaml", &folder.path().join(runs.to_string()), &[&common, overrides].concat()));
        for (name, tensor) in trainer.parameters() {
            if name.contains("lora_B") {
                let values = fixtures::Random::new(name.len() as u64).normal(tensor.size()) * 0.1;
                tch::no_grad(|| tensor.shallow_clone().copy_(&values));
            }
        }
        let metrics = trainer.train_step().unwrap();
        (trainer, metrics)
    };
    let gradients = |trainer: &Trainer| -> Vec<(String, Tensor)> {
        trainer.parameters().into_iter().map(|(name, tensor)| (name, tensor.grad().copy())).collect()
    };
    let (plain, without) = fresh(&[]);
    let plain = gradients(&plain);
    for accumulated in ["gradient_accumulation_steps=1", "gradient_accumulation_steps=2"] {
        if accumulated.ends_with('2') {
            // Two micro-batches are other data: only the anchor's value can be compared.
            assert_eq!(fresh(&[ANCHOR, accumulated]).1.loss_anchor, fresh(&[ANCHOR]).1.loss_anchor);
            continue;
        }
        let (trainer, with) = fresh(&[ANCHOR, accumulated]);
        assert_eq!((without.loss_lm, without.loss_anchor), (with.loss_lm, None));
        let anchor = with.loss_anchor.unwrap();
        assert!((with.loss - (without.loss + 0.5 * anchor)).abs() < 1e-6 && anchor > 1e-4, "{anchor}");
        let found = gradients(&trainer);

        // The definition, over the texts that the first step takes.
        for (_, tensor) in trainer.parameters() {
            tensor.shallow_clone().zero_grad();
        }
        let llm = trainer.student.model.llm();
        let texts = trainer.anchor.as_ref().unwrap().texts_of(0);
        assert_eq!(texts.len(), 2);
        assert!(texts.iter().any(|text| text.from > 0), "{texts:?}");
        let num_tokens = texts.iter().map(|text| text.ids.len() - text.from).sum::<usize>() as f64;
        let mut divergence = Tensor::zeros([], (Kind::Float, Device::Cpu));
        for Held { ids, from } in texts {
            let spans = Spans::text(&[ids.len() as i64]);
            let plan = || AttentionPlan::new(&spans, VisionAttention::Causal, Device::Cpu, Kind::Float).unwrap();
            let embeds = llm.embed(&Tensor::from_slice(&ids).unsqueeze(0));
            let log_probabilities = |plan: AttentionPlan| {
                let states = llm.decoder().forward(&embeds, &plan, 0).last_hidden_state;
                llm.logits(&states.slice(1, from as i64, None, 1)).log_softmax(-1, Kind::Float)
            };
            let p = log_probabilities(plan().without_adapters()).detach();
            let q = log_probabilities(plan().with_adapters(ActsOn::All));
            divergence += (p.exp() * (&p - q)).sum(Kind::Float) / num_tokens;
        }
        assert!((divergence.double_value(&[]) - anchor).abs() < 1e-6);
        (divergence * 0.5).backward();
        for ((name, found), (tensor, plain)) in
            found.iter().zip(trainer.parameters().iter().map(|(_, tensor)| tensor).zip(plain.iter().map(|p| &p.1)))
        {
            let own = tensor.grad();
            let expected = if own.defined() { plain + own } else { plain.shallow_clone() };
            let scale = expected.abs().max().double_value(&[]).max(1.0);
            let difference = (found - expected).abs().max().double_value(&[]);
            assert!(difference <= 2e-5 * scale, "{name}: {difference} of {scale}");
        }
    }
}

#[test]
fn an_anchor_may_come_every_other_step_and_from_records() {
    let folder = tempfile::tempdir().unwrap();
    annotations(folder.path());
    let run = folder.path().join("run");
    let words = folder.path().join("words.jsonl");
    let fetch = format!("data_fetch: {{data_paths: [{{anno_path: '{}', image_folder: ''}}]}}", words.display());
    let anchor = format!("text_anchor={{texts: 4, tokens: 8, max_length: 8, every: 2, {fetch}}}");
    let mut trainer = trainer(config("debug.yaml", &run, &[&anchor, "max_steps=4"]));
    trainer.train(&mut Silent).unwrap();
    let is_taken: Vec<bool> = anchored(&run).iter().map(Option::is_some).collect();
    assert_eq!(is_taken, [true, false, true, false]);
    let kept = std::fs::read_to_string(run.join("text_anchor.json")).unwrap();
    assert!(kept.contains("What is it?"), "{kept}");

    let pictures = anchor
        .replace("words.jsonl", "pictures.jsonl")
        .replace("image_folder: ''", &{ format!("image_folder: '{}'", folder.path().display()) });
    let other = folder.path().join("other");
    let error = format!("{:#}", try_new(config("debug.yaml", &other, &[&pictures]), false).err().unwrap());
    assert!(error.contains("text_anchor: record") && error.contains("has a picture"), "{error}");
}

#[test]
fn an_anchor_without_adapters_to_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/debug.yaml");
    let refused = |overrides: &[&str]| {
        let out = format!("output_dir={}", folder.path().display());
        let all: Vec<String> = [&[ANCHOR, &out], overrides].concat().iter().map(|o| (*o).to_owned()).collect();
        format!("{:#}", TrainConfig::open(&path, &all).unwrap_err())
    };
    let error = refused(&["model.lora.acts_on=with_image"]);
    assert!(error.contains("the adapters act on `with_image`, and the anchor's texts have no picture"), "{error}");
    let error = refused(&[OTHER_SYSTEMS[0]]);
    assert!(error.contains("text_anchor holds adapters") && error.contains("model.lora attaches none"), "{error}");
}

/// Adapters that a picture switches on learn nothing from a record without one.
#[test]
fn records_without_pictures_are_refused_where_they_train_nothing() {
    let folder = tempfile::tempdir().unwrap();
    annotations(folder.path());
    let run = folder.path().join("run");
    let words = folder.path().join("words.jsonl");
    let fetch = format!("data_paths: [{{anno_path: '{}', image_folder: ''}}]", words.display());
    for (acts_on, refused) in [("with_image", true), ("image_tokens", true), ("all", false)] {
        let overrides = [
            format!("data.train={{data_fetch: {{{fetch}}}}}"),
            format!("model.lora.acts_on={acts_on}"),
            "overwrite_output_dir=true".to_owned(),
            "max_steps=1".to_owned(),
            "distill={}".to_owned(),
            "model.aux_vision=".to_owned(),
            "model.reuse_aux_vision_embedding_layers=".to_owned(),
        ];
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        let step = trainer(config("debug.yaml", &run, &overrides)).train_step();
        assert_eq!(step.is_err(), refused, "{acts_on}: {step:?}");
        if let Err(error) = step {
            let error = error.to_string();
            assert!(error.contains("has no picture") && error.contains(acts_on), "{error}");
        }
    }
}
