#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = vora_gguf::Gguf::parse(bytes) else { return };
    file.names().for_each(|name| drop(file.tensor(name)));
    let Ok(model) = vora_gguf::Llm::new(file) else { return };
    model.names().for_each(|name| drop(model.tensor(name)));
    drop((model.config(), model.tokenizer(), model.tokenizer_config()));
});
