//! Choosing a device by name.

use ps_model::{DeviceError, compiled_devices, default_device_name, select_device};

#[test]
fn the_default_device_is_compiled_in_and_works() {
    assert_eq!(compiled_devices()[0], default_device_name());
    // A build for GPUs alone may be tested on a machine without one.
    if !["cuda", "wgpu"].contains(&default_device_name()) {
        select_device(default_device_name()).expect("a CPU backend works everywhere");
    }
}

#[test]
fn an_unknown_name_is_answered_with_the_known_ones() {
    for name in ["gpu", "", "flex:1", "tch:cuda:", "cuda:x", "wgpu:"] {
        let error = select_device(name).expect_err("not a device");
        assert_eq!(error, DeviceError::Unknown { name: name.into() });
        assert!(error.to_string().contains("tch:cuda:N"), "{error}");
    }
}

#[test]
fn a_backend_that_is_not_compiled_in_is_answered_with_its_feature() {
    for (name, feature) in [
        ("flex", "flex"),
        ("ndarray", "ndarray"),
        ("tch", "tch"),
        ("tch:cuda", "tch"),
        ("tch:cuda:0", "tch"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda"),
        ("wgpu", "wgpu"),
        ("wgpu:cpu", "wgpu"),
    ] {
        if compiled_devices().contains(&feature) {
            continue;
        }
        let error = select_device(name).expect_err("not compiled in");
        let name = name.into();
        assert_eq!(error, DeviceError::NotCompiledIn { name, feature });
        let command = format!("--features {feature}");
        assert!(error.to_string().contains(&command), "{error}");
    }
}

/// No machine has a thousand GPUs.
#[test]
fn a_missing_gpu_is_an_error_and_not_a_panic() {
    for (name, feature) in [
        ("tch:cuda:1000", "tch"),
        ("cuda:1000", "cuda"),
        ("wgpu:1000", "wgpu"),
    ] {
        if !compiled_devices().contains(&feature) {
            continue;
        }
        for _ in 0..2 {
            match select_device(name) {
                Err(DeviceError::Unavailable { name: named, .. }) => assert_eq!(named, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    if !["cuda", "wgpu"].contains(&default_device_name()) {
        select_device(default_device_name()).expect("the default device still works");
    }
}
