//! Other implementations of clients: Mosquitto's, and the Python library of the original wgkex.

use std::process::{Command, Output};

use rumqttc::QoS;
use wgkex_tests::raw_client::RawClient;
use wgkex_tests::stack::Stack;

use crate::{assert_serving, stack};

fn client(stack: &Stack, name: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(name);
    let output = command.args(["-p", &stack.mqtt.port().to_string()]).args(arguments).output();
    output.unwrap_or_else(|error| panic!("{name}: {error}: apt-get install mosquitto-clients"))
}

#[test]
fn mosquittos_clients_publish_subscribe_keep_and_clear() {
    let mut stack = stack();
    for (level, payload) in ["0", "1", "2"].into_iter().zip(["zero", "one", "two"]) {
        let output = client(&stack, "mosquitto_pub", &["-q", level, "-r", "-t", "kept/x", "-m", payload]);
        assert!(output.status.success(), "{output:?}");
        for wanted in ["0", "1", "2"] {
            let output = client(
                &stack,
                "mosquitto_sub",
                &["-q", wanted, "-t", "kept/#", "-C", "1", "-W", "20", "-F", "%t %p %r"],
            );
            assert_eq!(String::from_utf8_lossy(&output.stdout), format!("kept/x {payload} 1\n"));
        }
    }
    let output = client(&stack, "mosquitto_pub", &["-r", "-n", "-t", "kept/x"]);
    assert!(output.status.success());
    let mut raw = RawClient::connect(stack.mqtt, "raw");
    raw.subscribe(&[("kept/#", QoS::AtMostOnce)]);
    raw.publish("kept/end", "", 0, false);
    assert_eq!(raw.receive().topic, "kept/end");
    let output = client(&stack, "mosquitto_sub", &["-V", "mqttv5", "-t", "#", "-W", "20"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("rotocol"), "{output:?}");
    // Many messages, one per line.
    let lines: Vec<_> = (0..1000).map(|n| n.to_string()).collect();
    let mut raw = RawClient::connect(stack.mqtt, "raw");
    raw.subscribe(&[("lines", QoS::AtLeastOnce)]);
    let mut child = Command::new("mosquitto_pub")
        .args(["-p", &stack.mqtt.port().to_string(), "-q", "1", "-t", "lines", "-l"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines.join("\n").as_bytes()).unwrap();
    for line in lines {
        assert_eq!(raw.receive().payload, line);
    }
    assert!(child.wait().unwrap().success());
    assert_serving(&mut stack);
}

/// Runs the checks of `with_paho.py` with both generations of the library; it names the failing one.
#[test]
fn the_originals_library_does_all_that_it_can() {
    let mut stack = stack();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mqtt_server/with_paho.py");
    let output = Command::new("/usr/bin/python3").args([script, &stack.mqtt.port().to_string()]).output().unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && said.ends_with("all is well\n"),
        "{said}{wrong}(apt-get install python3-paho-mqtt)"
    );
    assert_serving(&mut stack);
}
