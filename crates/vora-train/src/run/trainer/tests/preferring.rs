//! Runs that learn from preferences.

use super::*;
use vora_run::metrics::RewardMetrics;

const DPO: [&str; 2] = ["loss=dpo", "distill={}"];

/// The steps of the log: DPO's loss and its rewards.
fn rewarded(folder: &Path) -> Vec<(f64, RewardMetrics)> {
    let lines = MetricsLog::read(&folder.join("metrics.jsonl")).unwrap();
    let step = |line| match line {
        Line::Step(s) => Some((s.loss_lm, s.rewards.unwrap())),
        Line::Eval(_) | Line::Event(_) => None,
    };
    lines.into_iter().filter_map(step).collect()
}

#[test]
fn a_run_of_preferences_goes_on_bit_for_bit() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let with = |folder: &Path| config("debug.yaml", folder, &[&DPO[..], &["max_steps=8"]].concat());
    let mut uninterrupted = trainer(with(whole.path()));
    uninterrupted.train(&mut Silent).unwrap();
    let mut first = trainer(with(parts.path()));
    let stop = first.stop.clone();
    assert_eq!(first.train(&mut StopAfter(3, stop)).unwrap(), Outcome::Stopped { step: 3 });
    drop(first);
    let mut second = try_new(with(parts.path()), true).unwrap();
    second.train(&mut Silent).unwrap();
    assert_same(&weights(&uninterrupted), &weights(&second));
    let found = rewarded(whole.path());
    assert_eq!((found.len(), &found), (8, &rewarded(parts.path())));
    // B is zero at first: the model is its own reference, and every pair costs log 2.
    let (loss, rewards) = found[0];
    assert!((loss - std::f64::consts::LN_2).abs() < 1e-6, "{loss}");
    assert_eq!((rewards.chosen, rewards.rejected, rewards.accuracies, rewards.margins), (0.0, 0.0, 0.0, 0.0));
    for (_, rewards) in &found {
        assert!((rewards.chosen - rewards.rejected - rewards.margins).abs() < 1e-12);
    }
    let tags: Vec<String> = tensorboard::scalars(whole.path()).unwrap().into_iter().map(|scalar| scalar.0).collect();
    for name in ["chosen", "rejected", "accuracies", "margins"] {
        assert!(tags.contains(&format!("train/rewards/{name}")), "{name}");
    }
}

#[test]
fn micro_batches_are_one_batch() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, overrides: &[&str]| {
        trainer(config("debug.yaml", &folder.path().join(name), &[&DPO[..], &["beta=0.5"], overrides].concat()))
    };
    // Losses and gradients are means over the pairs of the step, however it is cut.
    let one = |name, cut: [&str; 2]| {
        let mut trainer = run(name, &[&cut[..], &["max_grad_norm=0"]].concat());
        for (name, tensor) in trainer.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
            let values = fixtures::Random::new(name.len() as u64).normal(tensor.size()) * 0.1;
            tch::no_grad(|| tensor.shallow_clone().copy_(&values));
        }
        let metrics = trainer.train_step().unwrap();
        let gradients: Vec<Tensor> = trainer.parameters().iter().map(|(_, tensor)| tensor.grad().copy()).collect();
        (metrics, gradients)
    };
    let (whole, gradients) = one("whole", ["per_device_train_batch_size=4", "gradient_accumulation_steps=1"]);
    for (name, cut) in [
        ("cut", ["per_device_train_batch_size=1", "gradient_accumulation_steps=4"]),
        ("anew", ["per_device_train_batch_size=4", "gradient_checkpointing=true"]),
    ] {
        let (other, found) = one(name, cut);
        assert!((whole.loss_lm - other.loss_lm).abs() < 1e-5 && (whole.loss_lm - 0.693).abs() > 1e-3, "{name}");
        let [a, b] = [whole.rewards, other.rewards].map(Option::unwrap);
        assert!((a.margins - b.margins).abs() < 1e-5 && a.accuracies == b.accuracies, "{name}: {a:?} {b:?}");
        for (a, b) in gradients.iter().zip(&found).filter(|(a, _)| a.defined()) {
            let scale = a.abs().max().double_value(&[]).max(1.0);
            assert!((a - b).abs().max().double_value(&[]) < 2e-5 * scale, "{name}");
        }
    }
}

/// A file of TRL's records, of which some are bad: those are left out by line and name, and what the others prefer is
/// learned.
#[test]
fn records_of_trl_are_learned_from() {
    let folder = tempfile::tempdir().unwrap();
    annotations(folder.path());
    let record = |images: &str, rejected: &str| {
        format!(
            r#"{{"images": [{images}], "prompt": [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is it?"}}]}}], "chosen": [{{"role": "assistant", "content": "a star"}}]{rejected}}}"#
        )
    };
    let circle = r#", "rejected": [{"role": "assistant", "content": "a circle"}]"#;
    let lines = [
        record(r#""a.png""#, circle),
        record(r#""b.png""#, &circle.replace("circle", "ring of many words")),
        record(r#""a.png""#, ""),
        record(r#""a.png""#, &circle.replace("circle", "star")),
        record(r#""gone.png""#, circle),
    ];
    std::fs::write(folder.path().join("pairs.jsonl"), lines.join("\n")).unwrap();
    let at = folder.path().join("pairs.jsonl").display().to_string();
    let fetch = format!(
        "data={{train: {{data_fetch: {{data_paths: [{{anno_path: '{at}', image_folder: '{}'}}]}}}}}}",
        folder.path().display()
    );
    let run = folder.path().join("run");
    let overrides = [&DPO[..], &[&fetch, "max_steps=20", "per_device_train_batch_size=2"]].concat();
    let config = config("debug.yaml", &run, &overrides);
    let maker = SampleMaker::new(vora_student::preparation(&config, &resolve).unwrap());
    let source = data::training(&config, &Arc::new(maker)).unwrap();
    for (index, says) in [
        (2, "pairs.jsonl:3: it has a `chosen` answer and no `rejected` one"),
        (3, "pairs.jsonl:4: its `chosen` and `rejected` are the same answer"),
        (4, "pairs.jsonl:5: cannot read image `gone.png`"),
    ] {
        let message = format!("{:#}", source.sample(index).unwrap_err());
        assert!(message.contains(says), "{message}");
    }
    let mut trainer = trainer(config);
    trainer.train(&mut Silent).unwrap();
    let steps = rewarded(&run);
    let (loss, rewards) = steps[19];
    assert!(steps.len() == 20 && steps[0].1.margins == 0.0);
    assert!(rewards.margins > 1.0 && rewards.accuracies == 1.0 && loss < 0.4, "loss {loss}, {rewards:?}");
    assert!(trainer.loader.num_skipped() >= 3);
}

#[test]
fn what_dpo_needs_is_named() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/debug.yaml");
    let refused = |overrides: &[&str]| {
        let all: Vec<String> = overrides.iter().map(|entry| (*entry).to_owned()).collect();
        format!("{:#}", TrainConfig::open(&path, &all).unwrap_err())
    };
    for system in [0, 2, 3] {
        let error = refused(&["loss=dpo", OTHER_SYSTEMS[system]]);
        assert!(error.contains("loss is dpo") && error.contains("but model.lora attaches none"), "{error}");
    }
    assert!(refused(&["loss=dpo", "beta=0"]).contains("beta is 0, it must be above 0"));
    assert!(refused(&["beta=0.1"]).contains("beta is DPO's, but `loss: dpo` is not set"));
    assert!(refused(&["loss=ppo"]).contains("unknown variant `ppo`"));
    // LLaVA's second stage with adapters takes it.
    let folder = tempfile::tempdir().unwrap();
    let mut llava = trainer(config("debug.yaml", folder.path(), &["loss=dpo", "distill={}", OTHER_SYSTEMS[1]]));
    assert!(llava.train_step().unwrap().rewards.is_some());
}
