#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder in that for temporary ones");
    let tensors = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/golden/lora_peft/adapter_model.safetensors");
    std::fs::copy(tensors, folder.path().join("adapter_model.safetensors")).expect("the fixture is there");
    std::fs::write(folder.path().join("adapter_config.json"), bytes).expect("it can be written");
    drop(vora_lora::AdapterFolder::open(folder.path()));
});
