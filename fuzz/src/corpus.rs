//! Writes the inputs that the fuzz targets begin with, and runs all inputs of their directories once.
//!
//! ```text
//! cargo run --manifest-path fuzz/Cargo.toml --no-default-features --bin corpus
//! ```

use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    run_all(
        &corpus.join("frames"),
        ps_fuzz::frames::seeds(),
        ps_fuzz::frames::run,
    )?;
    run_all(
        &corpus.join("checkpoint"),
        ps_fuzz::checkpoint::seeds(),
        ps_fuzz::checkpoint::run,
    )?;
    run_all(
        &corpus.join("schedule"),
        ps_fuzz::schedule::seeds(),
        ps_fuzz::schedule::run,
    )?;
    run_all(
        &corpus.join("update_log"),
        ps_fuzz::update_log::seeds(),
        ps_fuzz::update_log::run,
    )
}

fn run_all(directory: &Path, seeds: Vec<Vec<u8>>, run: fn(&[u8])) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for (index, seed) in seeds.iter().enumerate() {
        fs::write(directory.join(format!("seed-{index:02}")), seed)?;
    }
    let mut num_run = 0;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        println!("{}", path.display());
        run(&fs::read(path)?);
        num_run += 1;
    }
    println!("{num_run} inputs of {}: no harm", directory.display());
    Ok(())
}
