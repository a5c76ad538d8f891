//! Whole runs and what they leave.

use super::*;

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

    let shown = SampleMaker::new(vora_student::preparation(&second, &resolve).unwrap());
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

#[test]
fn a_tower_learns_at_its_own_rate_and_goes_on_into_the_next_stage() {
    let [first, second, other] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let tower = |trainer: &Trainer| named(trainer, |name| name.starts_with("vision_tower."));
    let values = |tensors: Vec<(String, Tensor)>| {
        tensors.into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect::<Vec<_>>()
    };
    for (rate, moves) in [("0", false), ("1e-3", true)] {
        let rates = format!("learning_rates={{vision_tower: {rate}}}");
        let set = [OTHER_SYSTEMS[7], &rates, "weight_decay=0.1", "save_strategy=no"];
        let mut run = trainer(config("smoke.yaml", other.path(), &set));
        let before = values(tower(&run));
        assert!(before.iter().any(|(name, _)| name == "vision_tower.embeddings.cls_token"), "{before:?}");
        for _ in 0..2 {
            run.train_step().unwrap(); // the first of a warmup has a rate of 0
        }
        for ((name, before), (_, after)) in before.iter().zip(tower(&run)) {
            // The bias of a key changes no attention, and learns from rounding alone.
            assert!(before.equal(&after) != moves || (moves && name.ends_with("key.bias")), "{name}");
        }
    }

    let train = |folder: &Path, system: usize| {
        let mut stage_1 = trainer(config("smoke.yaml", folder, &[OTHER_SYSTEMS[system], "bf16=false", "max_steps=2"]));
        stage_1.train(&mut Silent).unwrap();
        stage_1
    };
    let stage_1 = train(first.path(), 7);
    let from = format!("model.pretrained={}", first.path().join("final").display());
    let seen = |trainer: &Trainer| {
        let picture = Tensor::ones([1, 3, 56, 56], (Kind::Float, Device::Cpu));
        tch::no_grad(|| trainer.student.model.image_features(&picture))
    };
    for (system, trains) in [(0, 0), (6, 4), (7, tower(&stage_1).len())] {
        let stage_2 = trainer(config("smoke.yaml", second.path(), &[OTHER_SYSTEMS[system], "bf16=false", &from]));
        assert_eq!(tower(&stage_2).len(), trains);
        assert!(seen(&stage_1).equal(&seen(&stage_2)), "system {system}");
    }
    // Adapters are folded in, and what comes next starts from there.
    let third = tempfile::tempdir().unwrap();
    let stage_1 = train(third.path(), 5);
    let from = format!("model.pretrained={}", third.path().join("final").display());
    let stage_2 = trainer(config("smoke.yaml", second.path(), &[OTHER_SYSTEMS[0], "bf16=false", &from]));
    fixtures::assert_close_to(&seen(&stage_2), &seen(&stage_1), 1e-4);
}

#[test]
fn adapters_of_a_tower_are_merged_with_those_of_the_llm() {
    for (system, targets) in [(5, "encoder.layer.0.mlp.fc1"), (6, "language_model.layers.0.mlp.up_proj")] {
        let [run, merged] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let mut trained =
            trainer(config("smoke.yaml", run.path(), &[OTHER_SYSTEMS[system], "bf16=false", "max_steps=3"]));
        trained.train(&mut Silent).unwrap();
        let last = run.path().join("final");
        let adapter = vora_lora::AdapterFolder::open(&last).unwrap();
        assert!(adapter.config().target_modules.iter().any(|target| target.ends_with(targets)), "{adapter:?}");
        let names = Checkpoint::open(&last.join("adapter_model.safetensors")).unwrap();
        let of_tower = "base_model.model.model.vision_tower.encoder.layer.0.";
        assert!(names.names().any(|name| name.starts_with(of_tower)));

        let mut model = vora_model::open(&last, Device::Cpu, Kind::Float, &resolve).unwrap();
        let batch = DeviceBatch::new(&trained.next_batches().unwrap()[0], Device::Cpu);
        let hidden = |model: &dyn VisionLanguageModel| {
            tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state
        };
        let before = hidden(&*model);
        model.merge().unwrap();
        fixtures::assert_close_to(&hidden(&*model), &before, 1e-4);
        model.save(merged.path()).unwrap();
        let again = vora_model::open(merged.path(), Device::Cpu, Kind::Float, &resolve).unwrap();
        assert!(again.vision_lora().is_none());
        assert!(hidden(&*again).equal(&hidden(&*model)));
        let mut base = vora_model::open(&last, Device::Cpu, Kind::Float, &resolve).unwrap();
        base.detach().unwrap();
        assert!(!hidden(&*base).equal(&before));
        let convert = vora_model::convert::Conversion::plan(&last, &Default::default(), &resolve);
        let error = convert.err().unwrap().to_string();
        assert!(error.contains("with adapters on the vision tower: `vora merge` folds them in"), "{error}");
    }
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
        let loss = tch::no_grad(|| vora_torch::nn::loss::cross_entropy(&hidden, &batch.targets, i64::MAX, logits));
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
fn teachers_of_other_grids_and_blocks_are_learned_from() {
    let folder = tempfile::tempdir().unwrap();
    let run = |settings: &[&str]| {
        let mut trainer = trainer(config("smoke.yaml", folder.path(), settings));
        let metrics = trainer.train_step().unwrap();
        // The weight is told where it changes.
        let scheduled = settings.iter().any(|setting| setting.contains("weight_schedule"));
        assert_eq!(metrics.distill_weight, scheduled.then_some(1.0));
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
