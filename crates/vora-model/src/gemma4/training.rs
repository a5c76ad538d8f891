//! Teaching a Gemma 4 Unified, against HF with PEFT: the gradients of a step, and adapters in and out.

use std::path::Path;

use anyhow::bail;
use fixtures::assert_close_to;
use tch::{Device, Kind, Tensor};
use vora_llm::DropoutSeed;
use vora_lora::{AdapterFolder, BaseModel, save_adapter};
use vora_text::{Span, Spans};
use vora_torch::checkpoint::save;
use vora_torch::weights::Weights;

use super::{Gemma4Unified, Gemma4UnifiedConfig};
use crate::files::to_object;
use crate::model::{Input, VisionLanguageModel};
use crate::trained::{Parts, VISION};

fn path(name: &str) -> std::path::PathBuf {
    fixtures::root().join(name)
}

/// The tiny model with the golden adapter, from a folder that a run would leave: without weights of the embedder, if it
/// stayed `frozen`.
fn write_part(folder: &Path, frozen: bool) {
    let adapter = path("golden/gemma4_peft");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(adapter.join(file), folder.join(file)).unwrap();
    }
    let mut config = Gemma4UnifiedConfig::open(&path("tiny/gemma4")).unwrap();
    config.lora = Some(AdapterFolder::open(&adapter).unwrap().config().clone());
    config.llm_name = "gemma4".to_owned();
    let json = serde_json::to_vec(&to_object(&config.to_json().unwrap()).unwrap()).unwrap();
    std::fs::write(folder.join("config.json"), json).unwrap();
    if !frozen {
        let base = Weights::open(&path("tiny/gemma4"), Device::Cpu, Kind::Float).unwrap();
        let vision = base.stored().unwrap().into_iter().filter(|(name, _)| name.contains("vision"));
        save(&folder.join(VISION), &vision.collect::<Vec<_>>(), &[]).unwrap();
    }
}

fn open(folder: &Path) -> Box<dyn VisionLanguageModel> {
    let resolve = |name: &str| if name == "gemma4" { Ok(path("tiny/gemma4")) } else { bail!("{name} is nowhere") };
    crate::open(folder, Device::Cpu, Kind::Float, &resolve).unwrap()
}

/// The rows of the golden step: words; a picture; two pictures.
fn batch() -> Input {
    let golden = fixtures::open("gemma4_unified");
    let one = vec![Span::text(4), Span::image(3, 5), Span::text(5)];
    let two = vec![Span::text(3), Span::image(4, 2), Span::text(3), Span::image(3, 5), Span::text(4)];
    let spans = Spans::new(vec![vec![Span::text(11)], one, two]);
    let pictures = (0..3).map(|i| golden[&format!("batch.pixel_values.{i}")].shallow_clone()).collect();
    Input::new(golden["batch.input_ids"].shallow_clone(), pictures, spans)
}

/// The places that are learned to predict from, in a batch's rows one after the other.
fn places(golden: &fixtures::Golden, input: &Input) -> Tensor {
    golden["places"].select(1, 0) * input.spans.seq() + golden["places"].select(1, 1)
}

#[test]
fn gradients_of_a_step_match_reference() {
    let golden = fixtures::open("gemma4_lora");
    let folder = tempfile::tempdir().unwrap();
    write_part(folder.path(), false);
    for recomputed in [false, true] {
        let lora = Gemma4UnifiedConfig::open(folder.path()).unwrap().lora;
        let new = Weights::random(1, Device::Cpu, Kind::Float);
        let model = Gemma4Unified::open_to_teach(&path("tiny/gemma4"), "gemma4", lora.as_ref(), true, &new).unwrap();
        let adapter = Parts::of(new.parameters(), &model).adapter;
        Parts { adapter, ..Parts::default() }.fill_from(folder.path()).unwrap();
        let parameters = new.parameters();
        assert_eq!(parameters.len(), golden.under("grad.").len());

        let input = batch();
        let (embeds, plan) = (model.embed(&input).unwrap(), model.plan(&input.spans).unwrap());
        let decoder = model.llm().decoder();
        let seed = DropoutSeed::new(0);
        let pass = match recomputed {
            true => decoder.forward_recomputed(&embeds, &plan, 0, seed),
            false => decoder.forward_train(&embeds, &plan, 0, seed),
        };
        pass.backward(|output| {
            let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &places(&golden, &input));
            let logits = model.llm().logits(&hidden);
            assert_close_to(&logits, &golden["logits"], 2e-5);
            let loss = logits.cross_entropy_for_logits(&golden["targets"]);
            assert_close_to(&loss, &golden["loss"], 1e-5);
            Ok(loss)
        })
        .unwrap();
        for (name, parameter) in parameters {
            let expected = &golden[&format!("grad.{name}")];
            assert!(expected.abs().max().double_value(&[]) > 1e-6, "{name}: the reference has no gradient to compare");
            assert_close_to(&parameter.grad(), expected, 1e-4);
        }
    }
}

#[test]
fn what_peft_trained_opens_and_merges() {
    let golden = fixtures::open("gemma4_lora");
    for frozen in [false, true] {
        let (folder, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_part(folder.path(), frozen);
        let mut model = open(folder.path());
        let logits = |model: &dyn VisionLanguageModel| {
            let input = batch();
            let output = tch::no_grad(|| model.forward(&input, 0)).unwrap();
            model.llm().logits(&output.last_hidden_state.flatten(0, 1).index_select(0, &places(&golden, &input)))
        };
        assert_close_to(&logits(&*model), &golden["logits"], 2e-5);
        assert!(model.save(merged.path()).unwrap_err().to_string().contains("merge first"));
        model.merge().unwrap();
        model.save(merged.path()).unwrap();
        assert_close_to(&logits(&*open(merged.path())), &golden["logits"], 3e-5);
    }
}

/// What is written is what PEFT wrote, under its names.
#[test]
fn adapters_are_written_as_peft_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    write_part(folder.path(), true);
    let model = open(folder.path());
    assert!(!model.adapts_llm_alone());
    let own = model.adapted().adapter_tensors().unwrap().into_iter();
    let own = own.map(|(name, tensor)| (format!("{}{name}", model.llm_prefix()), tensor)).collect();
    let parts = Parts::of(own, &*model);
    let written = tempfile::tempdir().unwrap();
    let config = model.peft_config().unwrap().unwrap();
    save_adapter(written.path(), &config, BaseModel::new("fixtures/tiny/gemma4"), &parts.adapter).unwrap();
    let open = |folder: &Path| {
        let mut stored = Weights::open(&folder.join("adapter_model.safetensors"), Device::Cpu, Kind::Float)
            .unwrap()
            .stored()
            .unwrap();
        stored.sort_by(|a, b| a.0.cmp(&b.0));
        stored
    };
    let (ours, theirs) = (open(written.path()), open(&path("golden/gemma4_peft")));
    assert_eq!(ours.len(), theirs.len());
    for ((name, ours), (expected, theirs)) in ours.iter().zip(&theirs) {
        assert!(name == expected && ours.equal(theirs), "{name}, {expected}");
    }
}
