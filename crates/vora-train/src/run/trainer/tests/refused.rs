//! What is refused, and what is passed over.

use super::*;

#[test]
fn another_rank_is_refused_with_both_values() {
    let folder = tempfile::tempdir().unwrap();
    trainer(config("smoke.yaml", folder.path(), &["max_steps=1"])).train(&mut Silent).unwrap();
    let changed = config("smoke.yaml", folder.path(), &["model.lora.r=8", "model.lora.layers=3", "max_steps=2"]);
    let error = format!("{:#}", try_new(changed, true).err().unwrap());
    assert!(error.contains("cannot resume from") && error.contains("step-1"), "{error}");
    assert!(error.contains("model.lora.layers was 2, is 3; model.lora.r was 4, is 8"), "{error}");
    // An anchor's texts are made before the first step.
    let anchored = config("smoke.yaml", folder.path(), &["max_steps=2", "text_anchor={}"]);
    let error = format!("{:#}", try_new(anchored, true).err().unwrap());
    assert!(error.contains("step-1: text_anchor is given and was not when the run began"), "{error}");
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

/// Its checkpoints may be gone, to save space: what was trained is still a run's.
#[test]
fn what_was_trained_is_not_written_over_without_checkpoints_either() {
    let folder = tempfile::tempdir().unwrap();
    let at = |resume: bool, overwrite: &str| {
        try_new(config("smoke.yaml", folder.path(), &["max_steps=1", overwrite]), resume)
    };
    trainer(config("smoke.yaml", folder.path(), &["max_steps=1"])).train(&mut Silent).unwrap();
    std::fs::remove_dir_all(folder.path().join("checkpoints")).unwrap();
    let before = std::fs::read(folder.path().join("final/SHA256SUMS")).unwrap();
    for (resume, expected) in
        [(false, "already holds the final/ of a run"), (true, "without a checkpoint to go on from")]
    {
        let error = at(resume, "overwrite_output_dir=false").err().unwrap().to_string();
        assert!(error.contains(expected) && error.contains("overwrite_output_dir=true"), "{error}");
        assert_eq!(std::fs::read(folder.path().join("final/SHA256SUMS")).unwrap(), before);
    }
    assert_eq!(at(true, "overwrite_output_dir=true").unwrap().step(), 0);
    at(false, "overwrite_output_dir=true").unwrap();
    assert!(!folder.path().join("final").exists());
    // An empty folder of that name is nobody's.
    std::fs::create_dir(folder.path().join("final")).unwrap();
    at(false, "overwrite_output_dir=false").unwrap();
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
    fails(
        &["data.train.data_preprocess={max_seq_len: 513}"],
        &[
            "data_preprocess.max_seq_len is 513",
            "made for 512 tokens (max_position_embeddings of ",
            "set it to 512 or less",
        ],
    );
    fails(&["learning_rates={lora_C: 1}"], &["learning_rates.lora_C"]);
    // Rows hold several samples, each within it.
    let packed = ["data.train.data_preprocess={max_seq_len: 513}", "data.train.packing=true"];
    drop(try_new(config("smoke.yaml", folder.path(), &packed), false).unwrap());
    fails(&["model.pretrained=x"], &["model.pretrained", "x/config.json"]);
}
