//! The examples with models of a real make: the same bits in one process and in three.

use crate::run::Run;

/// Returns the exported model.
fn trained(name: &str, arguments: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("model.safetensors");
    let export = ["--export", file.to_str().unwrap()];
    let (status, output) = Run::start_plain(name, &[arguments, &export].concat()).finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("Final "), "{output}");
    std::fs::read(file).unwrap()
}

fn check(name: &str, arguments: &[&str]) {
    let one = trained(name, arguments);
    let three = trained(name, &[arguments, &["--processes", "3"]].concat());
    assert!(one == three, "{name}");
    let fewer = ["--iterations", "1"];
    let other = trained(name, &[&arguments[2..], &fewer].concat());
    assert!(one != other, "{name} has not learned anything");
}

/// Batch normalization: S-20.
#[test]
fn a_residual_network_has_the_same_bits_in_one_process_and_in_three() {
    check(
        "resnet",
        &["--iterations", "6", "--batch-size", "8", "--offline"],
    );
}

/// Groups of parameters and a schedule: S-17, S-21. Dropout of burn's own has the same bits only in processes of
/// one worker each (M-4).
#[test]
fn a_transformer_has_the_same_bits_in_one_process_and_in_three() {
    check(
        "char_transformer",
        &["--iterations", "6", "--batch-size", "4", "--dropout", "0"],
    );
}
