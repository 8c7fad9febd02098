//! The examples with models of a real make: they learn, and have the same bits in one process and in three.

use crate::run::Run;

/// Returns the exported model, and the number that the program prints behind `says`.
fn trained(name: &str, arguments: &[&str], says: &str) -> (Vec<u8>, f64) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("model.safetensors");
    let export = ["--export", file.to_str().unwrap()];
    let (status, output) = Run::start_plain(name, &[arguments, &export].concat()).finish();
    assert!(status.success(), "{output}");
    let said = output.lines().find_map(|line| line.strip_prefix(says));
    let number = said.and_then(|said| said.split(' ').next());
    let number = number.unwrap_or_else(|| panic!("nobody said {says:?}: {output}"));
    let number = number.trim_end_matches('.').parse();
    let number = number.unwrap_or_else(|error| panic!("{error}: {output}"));
    (std::fs::read(file).unwrap(), number)
}

/// Checks what three processes reach, and that one process computes the same bits.
fn check(name: &str, arguments: &[&str], says: &str, is_learned: impl Fn(f64) -> bool) {
    let in_three = [arguments, &["--processes", "3"]].concat();
    let (three, reached) = trained(name, &in_three, says);
    assert!(is_learned(reached), "{name} reaches {reached} only");
    let (one, _) = trained(name, arguments, says);
    assert!(one == three, "{name}");
}

/// Batch normalization: S-20. Whoever always names the same digit is right for 10 % of the test images.
#[test]
fn a_residual_network_learns_in_three_processes_with_the_bits_of_one() {
    let arguments = ["--iterations", "120", "--batch-size", "16", "--offline"];
    check("resnet", &arguments, "Final accuracy is ", |percent| {
        percent > 60.0
    });
}

/// Groups of parameters and a schedule: S-17, S-21. Dropout of burn's own has the same bits only in processes of
/// one worker each (M-4). A model that gives each of the 62 characters the same probability has a loss of ln 62 = 4.13, and
/// one that knows how frequent each is, 3.31.
#[test]
fn a_transformer_learns_in_three_processes_with_the_bits_of_one() {
    let arguments = ["--iterations", "70", "--batch-size", "8", "--dropout", "0"];
    check("char_transformer", &arguments, "Final loss is ", |loss| {
        loss < 3.2
    });
}
