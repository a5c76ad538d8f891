//! Runs over an LLM whose weights are kept in few bits.

use super::*;

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Learns, goes on bit for bit, and what it leaves stands over the LLM as it is stored.
#[test]
fn a_run_in_few_bits_goes_on_bit_for_bit_and_merges_into_whole_weights() {
    for (key, bits) in [("model.load_in_4bit", 4), ("model.load_in_8bit", 8)] {
        let [whole, parts, merged, plain] = [(); 4].map(|()| tempfile::tempdir().unwrap());
        let given = format!("{key}=true");
        let with = |folder: &Path| config("smoke.yaml", folder, &["bf16=false", "max_steps=4", &given]);
        let mut uninterrupted = trainer(with(whole.path()));
        uninterrupted.train(&mut Silent).unwrap();
        let mut first = trainer(with(parts.path()));
        let stop = first.stop.clone();
        assert_eq!(first.train(&mut StopAfter(2, stop)).unwrap(), Outcome::Stopped { step: 2 });
        drop(first);
        let mut second = try_new(with(parts.path()), true).unwrap();
        second.train(&mut Silent).unwrap();
        assert_same(&weights(&uninterrupted), &weights(&second));
        assert_eq!(losses(whole.path()), losses(parts.path()));

        // The losses are near those over whole weights, and no more.
        trainer(config("smoke.yaml", plain.path(), &["bf16=false", "max_steps=4"])).train(&mut Silent).unwrap();
        for (found, expected) in losses(whole.path()).iter().zip(losses(plain.path())) {
            let apart = (found.1 - expected.1).abs();
            assert!(apart > 0.0 && apart < 0.1, "{key}: {found:?}, without it {expected:?}");
        }

        let last = whole.path().join("final");
        let said = &json(&last.join("config.json"))["quantization_config"];
        assert_eq!((&said["load_in_4bit"], &said["load_in_8bit"]), (&(bits == 4).into(), &(bits == 8).into()));
        assert!(std::fs::read_to_string(whole.path().join("config.yaml")).unwrap().contains("load_in_"));
        let mut model = vora_model::open(&last, Device::Cpu, Kind::Float, &resolve).unwrap();
        assert!(uninterrupted.student.model.adapted().quantization().is_some());
        assert_eq!(model.adapted().quantization(), None);
        let batch = DeviceBatch::new(&uninterrupted.next_batches().unwrap()[0], Device::Cpu);
        let hidden = |model: &dyn VisionLanguageModel| {
            tch::no_grad(|| model.forward(&batch.input, 0)).unwrap().last_hidden_state
        };
        let before = hidden(&*model);
        let apart = (hidden(&*uninterrupted.student.model) - &before).abs().max().double_value(&[]);
        assert!(apart > 0.0 && apart < 2.0, "{apart}");
        model.merge().unwrap();
        fixtures::assert_close_to(&hidden(&*model), &before, 1e-4);
        model.save(merged.path()).unwrap();
        assert!(json(&merged.path().join("config.json")).get("quantization_config").is_none());
        // A layer without adapters is the LLM's own, to the last bit.
        let name = "model.layers.3.mlp.down_proj.weight";
        let of = |folder: &Path, name: &str| Checkpoint::open(folder).unwrap().tensor(name).unwrap();
        let stored = of(&resolve("fixtures/tiny/llm").unwrap(), name).to_kind(Kind::Float);
        assert!(of(merged.path(), &format!("llm.{name}")).to_kind(Kind::Float).equal(&stored));
    }
}

#[test]
fn few_bits_are_for_a_llava_too_and_for_layers_computed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let llava = OTHER_SYSTEMS[1].replace("image_size", "load_in_4bit: true, image_size");
    let mut run = trainer(config("smoke.yaml", folder.path(), &[&llava, "bf16=false", "max_steps=2"]));
    run.train(&mut Silent).unwrap();
    assert!(run.student.model.adapted().quantization().is_some());
    let said = &json(&folder.path().join("final/config.json"))["quantization_config"];
    assert_eq!(said["bnb_4bit_quant_type"], "nf4");
    assert!(vora_model::open(&folder.path().join("final"), Device::Cpu, Kind::Float, &resolve).is_ok());

    let step = |key: &str| {
        let folder = tempfile::tempdir().unwrap();
        let mut run = trainer(config("smoke.yaml", folder.path(), &["bf16=false", "model.load_in_4bit=true", key]));
        run.train_step().unwrap()
    };
    let [kept, anew] = ["gradient_checkpointing=false", "gradient_checkpointing=true"].map(step);
    assert!((kept.loss_lm - anew.loss_lm).abs() < 1e-6 && (kept.grad_norm - anew.grad_norm).abs() < 1e-4);
}
