use std::path::Path;

#[test]
fn the_fatbin_was_made_from_these_sources() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".cu") || name.ends_with(".cuh"))
        .collect();
    names.sort();
    let hashes: String = names
        .iter()
        .map(|name| {
            format!("{:032x} {name}\n", xxhash_rust::xxh3::xxh3_128(&std::fs::read(folder.join(name)).unwrap()))
        })
        .collect();
    let noted = std::fs::read_to_string(folder.join("thermocline.fatbin.sources")).unwrap();
    assert!(hashes == noted, "the kernels' sources have changed: run kernels/cuda/build.sh");
}
