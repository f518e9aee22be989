vllm serve Qwen/Qwen2.5-32B-Instruct --max-model-len 2048 \
  --tensor-parallel-size 4 \
  --speculative-config '{"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [64]}}}' \
  --kv-transfer-config '{"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer", "kv_connector_extra_config": {"shared_storage_path": "/mnt/shared/states"}}'
