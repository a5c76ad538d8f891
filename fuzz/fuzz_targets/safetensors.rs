#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a file in the folder for temporary ones");
    std::fs::write(file.path(), bytes).expect("it can be written");
    let Ok(checkpoint) = vora_torch::checkpoint::Checkpoint::open(file.path()) else { return };
    checkpoint.names().for_each(|name| drop(checkpoint.tensor(name).map(|tensor| tensor.copy())));
});
