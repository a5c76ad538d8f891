//! Links the place of libtorch into `vora`, so that `cargo install` makes a command that runs from any folder.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    // Where `.libtorch` leads, not the link itself: the command outlives the clone that it was built in.
    let libtorch = std::env::var_os("LIBTORCH").and_then(|folder| std::fs::canonicalize(folder).ok());
    if let Some(libtorch) = libtorch {
        println!("cargo:rustc-link-arg-bins=-Wl,-rpath,{}", libtorch.join("lib").display());
    }
}
