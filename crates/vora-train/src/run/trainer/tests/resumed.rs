//! Runs that go on from a checkpoint, bit for bit.

use super::*;

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
