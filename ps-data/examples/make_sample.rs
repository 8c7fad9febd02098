//! Makes the sample that is compiled into `ps-data` from the full MNIST.
//!
//! Run: `cargo run --release -p ps-data --example make_sample -- MNIST_DIRECTORY OUTPUT_DIRECTORY`
//!
//! Takes, in the original order, the first 400 training and the first 100 test images of each
//! digit: 4,000 and 1,000 in all. Writes four gzip IDX files, about 0.8 MB, the same bytes on every
//! run (with one version of flate2).

use std::fs;
use std::io::Write;
use std::path::Path;

use flate2::{Compression, GzBuilder};
use ps_data::{ImageDataset, Mnist, MnistOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [input, output] = arguments.as_slice() else {
        return Err("usage: make_sample MNIST_DIRECTORY OUTPUT_DIRECTORY".into());
    };
    let mnist = Mnist::load(&MnistOptions {
        directory: Some(input.into()),
        ..Default::default()
    })?;
    let output = Path::new(output);
    fs::create_dir_all(output)?;
    for (name, data, per_class) in [("train", mnist.train, 400), ("t10k", mnist.test, 100)] {
        let chosen = first_of_each_class(&data, per_class);
        let pixels: Vec<u8> = chosen
            .iter()
            .flat_map(|&i| data.image(i).to_vec())
            .collect();
        let labels: Vec<u8> = chosen.iter().map(|&i| data.label(i)).collect();
        let count = u32::try_from(chosen.len())?;
        let images_path = output.join(format!("{name}-images-idx3-ubyte.gz"));
        write_idx(&images_path, &[0x0803, count, 28, 28], &pixels)?;
        let labels_path = output.join(format!("{name}-labels-idx1-ubyte.gz"));
        write_idx(&labels_path, &[0x0801, count], &labels)?;
    }
    Ok(())
}

fn first_of_each_class(data: &ImageDataset, per_class: usize) -> Vec<usize> {
    let mut taken = vec![0; data.num_classes()];
    (0..data.len())
        .filter(|&index| {
            let taken = &mut taken[usize::from(data.label(index))];
            *taken += 1;
            *taken <= per_class
        })
        .collect()
}

fn write_idx(path: &Path, header: &[u32], body: &[u8]) -> std::io::Result<()> {
    // No time stamp and no file name in the gzip header, so that equal input gives equal bytes.
    let mut encoder = GzBuilder::new().write(fs::File::create(path)?, Compression::best());
    for word in header {
        encoder.write_all(&word.to_be_bytes())?;
    }
    encoder.write_all(body)?;
    encoder.finish()?.sync_all()
}
