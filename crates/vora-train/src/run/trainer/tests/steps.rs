//! Single steps.

use super::*;

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
