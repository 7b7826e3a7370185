use std::path::Path;
use std::process::Command;
use thermocline_kernels::cuda::{CudaError, Device};

/// Kernels take their arguments as their sources say: an emulator of others would read what is not there.
#[test]
fn an_emulator_of_other_sources_is_refused() {
    if std::env::var_os("THERMOCLINE_TEST_DEVICE").is_some() {
        // A machine with a GPU may have no compiler, and needs no emulator.
        return;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("other-emulator");
    std::fs::create_dir_all(&folder).unwrap();
    let (source, library) = (folder.join("other.cpp"), folder.join("other.so"));
    let text = "extern \"C\" unsigned thermocline_emulator_abi() { return 2; }\nextern \"C\" int thermocline_emulate() { return 1; }\n";
    std::fs::write(&source, text).unwrap();
    assert!(Command::new("g++").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status().unwrap().success());
    let Err(error) = Device::emulated(&library) else { panic!("it was taken") };
    assert!(matches!(&error, CudaError::Emulator { path, .. } if *path == library), "{error:?}");
    assert!(error.to_string().contains("made from other sources"), "{error}");
}
